"""Which part of a parameter a rank holds: a parameter is a local tensor that knows its placement.

Placements are torch.distributed.tensor's own (`Shard(dim)`, `Replicate()`), so that `state_dict` and checkpoints can
state them as DTensors without a second vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Placement, Replicate, Shard

from tpmp_kernels.comm.communicator import Communicator


def shard_size(size: int, ranks: int, what: str) -> int:
    """Length of one of `ranks` equal shards of an axis of `size`; ValueError where it does not divide."""
    if size % ranks:
        allowed = [r for r in range(1, ranks + 1) if size % r == 0]
        raise ValueError(f"{what} is {size}, not divisible by tp={ranks}; use tp in {allowed} or change {what}")
    return size // ranks


def shard_parameter(shape: tuple[int, ...], dim: int, comm: Communicator, *, axis: str, dtype, device) -> nn.Parameter:
    """An uninitialised parameter: this rank's shard, along `dim`, of a weight of the whole `shape`. ValueError, which
    calls that axis `axis`, where it does not divide."""
    local = list(shape)
    local[dim] = shard_size(shape[dim], comm.size, axis)
    parameter = nn.Parameter(torch.empty(local, dtype=dtype, device=device))
    parameter.tp_placement = Shard(dim)
    return parameter


def placement_of(parameter: Tensor) -> Placement:
    """`Shard(dim)` where the parameter is one rank's part of a weight, else `Replicate()`."""
    return getattr(parameter, "tp_placement", None) or Replicate()


def take_shard(full: Tensor, placement: Placement, comm: Communicator) -> Tensor:
    """The part of `full` that this rank of `comm` holds under `placement` (a view)."""
    return full.chunk(comm.size, dim=placement.dim)[comm.rank] if isinstance(placement, Shard) else full
