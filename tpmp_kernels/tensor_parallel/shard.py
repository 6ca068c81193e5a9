"""Which part of a parameter a rank holds: a parameter is a local tensor that knows its placement.

| attribute         | on               | meaning                                                                      |
| ----------------- | ---------------- | ---------------------------------------------------------------------------- |
| `tp_placement`    | sharded ones     | `Shard(dim)` of torch.distributed.tensor; a parameter without it is whole    |
| `tp_replicas`     | k, v projections | neighbouring ranks that hold the same shard, of R / replicas; elsewhere 1    |
| `tp_unpadded`     | vocabulary       | length of the whole along `dim` without the zeros at its end                 |
| `tp_partial_grad` | see gradients.py | neighbouring ranks over which what backward leaves in the gradient is to add |

torch drops attributes where it makes a new parameter; a ShardedModule's keep theirs.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Placement, Replicate, Shard

from tpmp_kernels.comm.communicator import Communicator


class ShardedModule(nn.Module):
    """A module whose own parameters keep their marks in to_empty, .to, load_state_dict(assign=True) and deepcopy."""

    def _apply(self, fn, recurse: bool = True):
        with _kept_marks(self):
            return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        with _kept_marks(self):
            super()._load_from_state_dict(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ShardedModule":
        copied = memo[id(self)] = self.__new__(type(self))
        copied.__setstate__(copy.deepcopy(vars(self), memo))
        for name, marks in _marks(self).items():
            vars(getattr(copied, name)).update(marks)
        return copied


@contextmanager
def _kept_marks(module: nn.Module) -> Iterator[None]:
    marks = _marks(module)
    yield
    for name in marks:
        vars(getattr(module, name)).update(marks[name])


def _marks(module: nn.Module) -> dict[str, dict[str, Any]]:
    return {
        name: {mark: value for mark, value in vars(parameter).items() if mark.startswith("tp_")}
        for name, parameter in module.named_parameters(recurse=False)
    }


def shard_size(size: int, ranks: int, what: str) -> int:
    """Length of one of `ranks` equal shards of an axis of `size`; ValueError where it does not divide."""
    if size % ranks:
        allowed = [r for r in range(1, ranks + 1) if size % r == 0]
        raise ValueError(f"{what} is {size}, not divisible by tp={ranks}; use tp in {allowed} or change {what}")
    return size // ranks


def shard_parameter(
    shape: tuple[int, ...], dim: int, comm: Communicator, *, axis: str, dtype, device, replicas: int = 1
) -> nn.Parameter:
    """An uninitialised parameter: this rank's shard, along `dim`, of a weight of the whole `shape`. ValueError, which
    calls that axis `axis`, where it does not divide.

    replicas: neighbouring ranks that hold the same shard; their gradients are partial sums.
    """
    if comm.size % replicas:
        raise ValueError(
            f"replicas is {replicas}, which does not divide tp={comm.size}; pass how many neighbours share a shard"
        )
    local = list(shape)
    local[dim] = shard_size(shape[dim], comm.size // replicas, axis)
    parameter = nn.Parameter(torch.empty(local, dtype=dtype, device=device))
    parameter.tp_placement = Shard(dim)
    if replicas > 1:
        parameter.tp_replicas = parameter.tp_partial_grad = replicas
    return parameter


def placement_of(parameter: Tensor) -> Placement:
    """`Shard(dim)` where the parameter is one rank's part of a weight, else `Replicate()`."""
    return getattr(parameter, "tp_placement", None) or Replicate()


def replicas_of(parameter: Tensor) -> int:
    """Neighbouring ranks that hold the same shard of a sharded parameter: rank r holds part r // replicas."""
    return getattr(parameter, "tp_replicas", 1)


def take_shard(full: Tensor, placement: Placement, comm: Communicator, replicas: int = 1) -> Tensor:
    """The part of `full` that this rank of `comm` holds under `placement` (a view)."""
    if not isinstance(placement, Shard):
        return full
    return full.chunk(comm.size // replicas, dim=placement.dim)[comm.rank // replicas]


def shard_of(full: Tensor, parameter: Tensor, comm: Communicator) -> Tensor:
    """The part of the whole `full`, without padding, that `parameter` holds on this rank; zeros where it is padding."""
    placement, replicas = placement_of(parameter), replicas_of(parameter)
    if hasattr(parameter, "tp_unpadded"):
        padding = parameter.shape[placement.dim] * (comm.size // replicas) - full.shape[placement.dim]
        behind = full.dim() - 1 - placement.dim
        full = F.pad(full, (*[0] * (2 * behind + 1), padding))
    return take_shard(full, placement, comm, replicas)
