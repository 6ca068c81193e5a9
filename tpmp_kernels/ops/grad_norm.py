"""ops.grad_norm and ops.clip_grads_: the norm of all gradients, the same bits for every tensor-parallel size.

One fp64 sum of squares for each leaf of each parameter; the sums of all ranks, in the order of the parameters, are
added in one binary tree. A sharded parameter has `leaves` equal leaves, of which each rank holds its part, and every
leaf is packed and added in an order that depends on its size alone: so it does not matter who adds it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tpmp_kernels import reference
from tpmp_kernels.ops import backend, checks, sharding
from tpmp_kernels.ops._register import register


@torch.no_grad()
def grad_norm(
    grads: Sequence[Tensor | None],
    *,
    group: Any = None,
    sharded: Sequence[int | None] | None = None,
    leaves: int | None = None,
) -> Tensor:
    """sqrt of the sum of all squares: an fp64 scalar on the gradients' device, the same on every rank.

    grads: of this rank's parameters (or shards), in one order for all ranks, fp64, fp32, fp16 or bf16; None counts as
    zero. sharded[i]: the dimension along which parameter i is cut evenly over `group`, or None where every rank has
    all of it, and it is counted once. group: an object with rank, size and all_gather(output, input, tag=).

    leaves: into how many parts a sharded dimension is cut, counted over the whole parameter, by default one for each
    rank. With leaves=8 the norm has the same bits on 1, 2, 4 and 8 ranks. Not differentiable. Raises ValueError where
    leaves or a dimension does not divide, TypeError for dtypes.
    """
    sharded = [None] * len(grads) if sharded is None else list(sharded)
    size = 1 if group is None else group.size
    leaves = size if leaves is None else leaves
    _check(grads, sharded, size, leaves)
    given = [grad for grad in grads if grad is not None]
    if given and backend.choose(given[0]) == "reference":
        return reference.grad_norm(grads, group=group, sharded=sharded, leaves=leaves)
    counts = [1 if dim is None else leaves // size for dim in sharded]
    where = {"dtype": torch.float64, "device": given[0].device if given else None}
    sums = [torch.zeros(0, **where)]
    for grad, dim, count in zip(grads, sharded, counts, strict=True):
        sums.append(torch.zeros(count, **where) if grad is None else _square_sums(grad, dim, count))
    local = torch.cat(sums)
    if size > 1:
        everyone = group.all_gather(local.new_empty(size * len(local)), local, tag="grad_norm")
        local = everyone[torch.tensor(_global_order(sharded, counts, size), device=local.device)]
    return _tree_sum(local).sqrt()


def _check(grads: Sequence[Tensor | None], sharded: list[int | None], size: int, leaves: int) -> None:
    if len(sharded) != len(grads):
        raise ValueError(
            f"grad_norm: sharded must have one entry for each gradient, got {len(sharded)} for {len(grads)}; "
            "pass None for a parameter that is not cut"
        )
    if leaves < 1 or leaves % size:
        raise ValueError(
            f"grad_norm: leaves must be a multiple of the group's size, got {leaves} for {size} ranks; pass a common "
            "multiple of all sizes whose norms shall agree"
        )
    for i, (grad, dim) in enumerate(zip(grads, sharded, strict=True)):
        if grad is not None:
            _check_one(f"grads[{i}]", grad, dim, leaves // size)


def _check_one(name: str, grad: Tensor, dim: int | None, leaves: int) -> None:
    checks.tensors("grad_norm", **{name: grad})
    checks.together("grad_norm", grad, first=name)
    if type(grad) is not Tensor:
        sharding.meet("grad_norm", {name: grad})
    if dim is not None and not 0 <= dim < grad.dim():
        raise ValueError(
            f"grad_norm: {name} has {grad.dim()} dimensions but is said to be cut along {dim}; pass one of its own, "
            "counted from 0"
        )
    if dim is not None and grad.shape[dim] % leaves:
        raise ValueError(
            f"grad_norm: {name} has {grad.shape[dim]} elements along dimension {dim}, not divisible by the {leaves} "
            "leaves of each rank; pad the parameter, or use fewer leaves"
        )


def _global_order(sharded: list[int | None], counts: list[int], size: int) -> list[int]:
    """Places in the gathered sums, rank after rank, of all leaves of each parameter; a whole one is taken of rank 0."""
    order: list[int] = []
    start, all_counts = 0, sum(counts)
    for dim, count in zip(sharded, counts, strict=True):
        for rank in range(1 if dim is None else size):
            order += range(rank * all_counts + start, rank * all_counts + start + count)
        start += count
    return order


def _tree_sum(values: Tensor) -> Tensor:
    """Neighbours first: an order that torch.sum, which divides its work among threads, does not promise."""
    if len(values) == 0:
        return values.new_zeros(())
    while len(values) > 1:
        if len(values) % 2:
            values = torch.cat((values, values.new_zeros(1)))
        values = values[0::2] + values[1::2]
    return values[0]


def _sums(grad: Tensor, dim: int | None, leaves: int) -> Tensor:
    """[leaves] fp64: the sum of squares of each of `leaves` parts along `dim`, or of all of it for None."""
    cut = grad.unsqueeze(0) if dim is None else grad.unflatten(dim, (leaves, grad.shape[dim] // leaves)).movedim(dim, 0)
    packed = cut.reshape(leaves, grad.numel() // leaves).contiguous()
    if backend.choose(grad) == "triton":
        from tpmp_kernels.kernels.square_sum import square_sums

        return square_sums(packed)
    return torch.stack([_square_sum(leaf) for leaf in packed])


# Sums of so many elements are small enough for one thread, so that the number of threads changes no bit; and so many
# of them are taken at a time, which bounds the fp64 copy.
_RUN, _RUNS = 1024, 1024


def _square_sum(leaf: Tensor) -> Tensor:
    whole = leaf.numel() // _RUN * _RUN
    sums = [part.double().square().sum(1) for part in leaf[:whole].view(-1, _RUN).split(_RUNS)]
    return _tree_sum(torch.cat([*sums, leaf[whole:].double().square().sum().reshape(1)]))


def _fake(grad, dim, leaves):
    return grad.new_empty(leaves, dtype=torch.float64)


_square_sums = register(
    "square_sums(Tensor grad, int? dim, int leaves) -> Tensor",
    _sums,
    _fake,
    sharding="the norm is taken of each rank's own part",
)


@torch.no_grad()
def clip_grads_(
    grads: Sequence[Tensor | None], norm: Tensor, max_norm: float, *, error_if_nonfinite: bool = False
) -> None:
    """Scale the gradients in place by min(1, max_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_ does.

    norm: a scalar tensor, from `grad_norm`; it is not read by the host, unless error_if_nonfinite asks for a ValueError
    where it is inf or nan. Without that, such a norm makes the gradients zero or nan, as in torch.
    """
    if not max_norm >= 0:
        raise ValueError(f"clip_grads_: max_norm must be at least 0, got {max_norm}; pass the largest norm to allow")
    if error_if_nonfinite and not bool(norm.isfinite()):
        raise ValueError(
            f"clip_grads_: the norm is {norm.item()}, expected a finite one; leave out error_if_nonfinite to go on"
        )
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for grad in grads:
        if grad is not None:
            alike.setdefault((grad.device, grad.dtype), []).append(grad)
    for (device, dtype), some in alike.items():
        torch._foreach_mul_(some, scale.to(device, torch.promote_types(dtype, torch.float32)))
