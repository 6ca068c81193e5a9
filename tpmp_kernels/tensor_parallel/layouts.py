"""Layouts of activations: from the one in which a tensor comes to the one in which it is wanted, differentiably.

A layout is a placement of torch.distributed.tensor over the tensor-parallel ranks. A plain tensor is taken to be in the
layout that a plan declares, and its gradient comes back in that layout; a DTensor says itself how it lies, and how its
gradient does: one that is a partial sum over ranks is reduced once, where the gathered tensor was made.

| from, to             | forward        | backward       |
| -------------------- | -------------- | -------------- |
| Shard(d), Replicate  | all-gather     | own slice      |
| Replicate, Shard(d)  | own slice      | all-gather     |
| Partial, Replicate   | all-reduce     | identity       |
| Partial, Shard(d)    | reduce-scatter | all-gather     |
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from tpmp_kernels.comm import Communicator, autograd


class Group(NamedTuple):
    """The tensor-parallel ranks; `mesh` is None where there is a communicator alone, and so no DTensor."""

    comm: Communicator
    mesh: DeviceMesh | None

    def __deepcopy__(self, memo: dict) -> "Group":
        """Itself, with its mesh: a copy of a layer stands among the same ranks."""
        return self


def redistribute(x: Tensor, source: Placement, target: Placement, comm: Communicator, *, tag: str) -> Tensor:
    """The plain tensor x of layout `source` in layout `target`. ValueError where a dimension does not divide."""
    source, target = _positive(source, x), _positive(target, x)
    if source == target:
        return x
    if target.is_partial():
        raise ValueError(f"{tag}: a tensor in layout {source} is not to be had as partial sums; ask for Replicate()")
    if source.is_partial():
        if isinstance(target, Shard):
            return autograd.reduce_scatter(x, comm, dim=target.dim, tag=tag)
        return autograd.all_reduce(x, comm, tag=tag)
    if isinstance(source, Shard):
        x = autograd.all_gather(x, comm, dim=source.dim, grad="slice", tag=tag)
    return autograd.split(x, comm, dim=target.dim, tag=tag) if isinstance(target, Shard) else x


def plain(x: Tensor, declared: Placement) -> tuple[Tensor, Placement]:
    """x, plain in layout `declared` or a DTensor, as a plain tensor, and its layout."""
    if not isinstance(x, DTensor):
        return x, declared
    placement = _placement(x)
    return x.to_local(grad_placements=[Replicate() if placement.is_partial() else placement]), placement


def enter(x: Tensor, declared: Placement, target: Placement, group: Group, *, tag: str) -> Tensor:
    """x, plain in layout `declared` or a DTensor, as a plain tensor in layout `target`."""
    return redistribute(*plain(x, declared), target, group.comm, tag=tag)


def enter_whole(x: Tensor, declared: Placement, group: Group, *, tag: str) -> tuple[Tensor, bool]:
    """x as a column layer reads it, whole, and whether what the ranks find for its gradient is added behind here: where
    not, the layer has to."""
    if isinstance(x, DTensor) and _placement(x).is_replicate():
        return x.to_local(grad_placements=[Partial()]), True
    local, source = plain(x, declared)
    source = _positive(source, local)
    if isinstance(source, Shard):
        return autograd.all_gather(local, group.comm, dim=source.dim, tag=tag), True
    return redistribute(local, source, Replicate(), group.comm, tag=tag), False


def leave(y: Tensor, source: Placement, target: Placement, group: Group, *, local: bool, tag: str) -> Tensor:
    """The plain tensor y of layout `source` in layout `target`: plain where `local`, else a DTensor."""
    if local:
        return redistribute(y, source, target, group.comm, tag=tag)
    if target.is_replicate():
        return _Whole.apply(y, _positive(source, y), group, tag)
    y = redistribute(y, source, target, group.comm, tag=tag)
    return DTensor.from_local(y, group.mesh, [_positive(target, y)], run_check=False)


class _Whole(torch.autograd.Function):
    """A plain tensor in any layout -> a DTensor, replicated, whose gradient may be a partial sum."""

    @staticmethod
    def forward(ctx, y: Tensor, source: Placement, group: Group, tag: str) -> DTensor:
        ctx.set_materialize_grads(False)
        ctx.source, ctx.group, ctx.tag = source, group, tag
        whole = redistribute(y, source, Replicate(), group.comm, tag=tag)
        return DTensor.from_local(whole, group.mesh, [Replicate()], run_check=False)

    @staticmethod
    def backward(ctx, grad: DTensor | None):
        if grad is None:
            return None, None, None, None
        # The gradient of a partial sum is the same for every summand.
        target = Replicate() if ctx.source.is_partial() else ctx.source
        grad = redistribute(grad.to_local(), _placement(grad), target, ctx.group.comm, tag=f"{ctx.tag}.grad")
        return grad, None, None, None


def _placement(x: DTensor) -> Placement:
    if len(x.placements) != 1:
        raise ValueError(
            f"expected a DTensor over the tensor-parallel dimension alone, got placements {x.placements} on "
            f"{x.device_mesh}; slice the mesh, or pass x.to_local()"
        )
    return x.placements[0]


def _positive(placement: Placement, x: Tensor) -> Placement:
    return Shard(placement.dim % x.dim()) if isinstance(placement, Shard) else placement
