"""Problems of ops.rope. The table and the positions are no inputs: nothing flows back to them."""

import torch
from problem import Problem

from tpmp_kernels import reference

POSITIONS = {"": None, "-positions": [4, 0, 2, 5, 8], "-positions of each": [[4, 0, 2, 5, 8], [1, 1, 0, 3, 2], [0] * 5]}


def alike(tensor: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor | None:
    """The same where q lives: its device, or replicated over its mesh."""
    if tensor is None or not hasattr(q, "device_mesh"):
        return tensor if tensor is None else tensor.to(getattr(q, "device", None))
    from torch.distributed.tensor import Replicate, distribute_tensor

    return distribute_tensor(tensor, q.device_mesh, [Replicate()] * q.device_mesh.ndim)


def _rope(name: str, positions: list | None, rotated: int) -> Problem:
    table, ids = reference.rope_table(9, rotated), None if positions is None else torch.tensor(positions)

    def call(room, q, k):
        first = None if ids is None else ids[..., : q.shape[1]] if torch.is_tensor(q) and q.dim() == 4 else ids
        return room.rope(q, k, alike(table, q), alike(first, q))

    return Problem(f"rope{name}", "rope", ((3, 5, 4, 6), (3, 5, 2, 6)), call, lambda q, k: (q, k, table, ids, False))


ROPES = [_rope(name, positions, 6) for name, positions in POSITIONS.items()] + [_rope("-partial", None, 4)]
