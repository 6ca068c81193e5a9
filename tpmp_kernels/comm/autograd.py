"""Differentiable collectives: the operators that make a layer tensor parallel, in pairs of transposes.

| function         | forward             | backward                | where it stands                                 |
| ---------------- | ------------------- | ----------------------- | ----------------------------------------------- |
| `copy`           | identity            | all-reduce              | in front of column-parallel linears             |
| `all_reduce`     | all-reduce          | identity                | behind row-parallel linears: Y is a partial sum |
| `all_gather`     | shards of all ranks | reduce-scatter or slice | where shards are wanted whole                   |
| `reduce_scatter` | shard of the sum    | all-gather              | where a partial Y is wanted in shards           |
| `split`          | own shard           | all-gather              | where a whole X is wanted in shards             |

`copy` and `all_reduce` are f and g of Shoeybi et al., Megatron-LM (arXiv 1909.08053), `all_gather` and `reduce_scatter`
their forms under sequence parallelism (Korthikanti et al., arXiv 2205.05198). The backward of each is another of them,
so that second derivatives need nothing more. `tag` names the call to peers. With one rank each is the identity.

Dimension 0 is gathered and scattered in place; any other one goes through one packed copy.
"""

from typing import Literal

import torch
from torch import Tensor

from tpmp_kernels.comm.communicator import Communicator


def copy(x: Tensor, comm: Communicator, *, tag: str = "") -> Tensor:
    """`x` itself; in backward the gradient is summed over the ranks of `comm`."""
    return x if comm.size == 1 else _Copy.apply(x, comm, tag)


def all_reduce(x: Tensor, comm: Communicator, *, tag: str = "") -> Tensor:
    """The sum of `x` over the ranks of `comm`, a new tensor; in backward the gradient passes unchanged."""
    return x if comm.size == 1 else _AllReduce.apply(x, comm, tag)


def all_gather(
    x: Tensor,
    comm: Communicator,
    *,
    dim: int = 0,
    grad: Literal["reduce_scatter", "slice"] = "reduce_scatter",
    tag: str = "",
) -> Tensor:
    """The `x` of all ranks in order of rank along `dim`: [.., n, ..] -> [.., R n, ..].

    grad: "reduce_scatter" where each rank makes its own use of the result, so that its gradients are to be summed;
    "slice" where every rank does the same with it, so that each holds the whole gradient already. ValueError for
    another `grad` or a dimension that x has not.
    """
    if grad not in ("reduce_scatter", "slice"):
        raise ValueError(f'all_gather: grad must be "reduce_scatter" or "slice", got {grad!r}; pass one of these')
    dim = _dimension("all_gather", x, dim)
    return x if comm.size == 1 else _AllGather.apply(x, comm, dim, grad, tag)


def reduce_scatter(x: Tensor, comm: Communicator, *, dim: int = 0, tag: str = "") -> Tensor:
    """This rank's shard along `dim` of the sum of `x` over the ranks: [.., R n, ..] -> [.., n, ..]. ValueError where R
    does not divide it."""
    dim = _divisible("reduce_scatter", x, dim, comm)
    return x if comm.size == 1 else _ReduceScatter.apply(x, comm, dim, tag)


def split(x: Tensor, comm: Communicator, *, dim: int = 0, tag: str = "") -> Tensor:
    """This rank's shard along `dim` of an `x` that all ranks hold: [.., R n, ..] -> [.., n, ..]. ValueError where R
    does not divide it."""
    dim = _divisible("split", x, dim, comm)
    return x if comm.size == 1 else _Split.apply(x, comm, dim, tag)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, comm: Communicator, tag: str) -> Tensor:
        ctx.comm, ctx.tag = comm, tag
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return all_reduce(grad, ctx.comm, tag=f"{ctx.tag}.grad"), None, None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, comm: Communicator, tag: str) -> Tensor:
        ctx.comm, ctx.tag = comm, tag
        # A copy of its own: the collective works in place, and an argument of autograd is never written.
        return comm.all_reduce(x.detach().clone(memory_format=torch.contiguous_format), tag=tag)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return copy(grad, ctx.comm, tag=f"{ctx.tag}.grad"), None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, comm: Communicator, dim: int, grad: str, tag: str) -> Tensor:
        ctx.comm, ctx.dim, ctx.tag = comm, dim, tag
        ctx.transpose = reduce_scatter if grad == "reduce_scatter" else split
        whole = comm.all_gather(x.new_empty(comm.size, *x.shape), x, tag=tag)
        return whole.movedim(0, dim).flatten(dim, dim + 1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.transpose(grad, ctx.comm, dim=ctx.dim, tag=f"{ctx.tag}.grad"), None, None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, comm: Communicator, dim: int, tag: str) -> Tensor:
        ctx.comm, ctx.dim, ctx.tag = comm, dim, tag
        parts = _parts(x, dim, comm.size)
        return comm.reduce_scatter(x.new_empty(parts.shape[1:]), parts, tag=tag)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return all_gather(grad, ctx.comm, dim=ctx.dim, tag=f"{ctx.tag}.grad"), None, None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, comm: Communicator, dim: int, tag: str) -> Tensor:
        ctx.comm, ctx.dim, ctx.tag = comm, dim, tag
        # A copy, so that the whole x need not live as long as its shard.
        return _parts(x, dim, comm.size)[comm.rank].clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return all_gather(grad, ctx.comm, dim=ctx.dim, grad="slice", tag=f"{ctx.tag}.grad"), None, None, None


def _parts(x: Tensor, dim: int, ranks: int) -> Tensor:
    """A view [ranks, ..] of the equal parts along `dim`."""
    return x.unflatten(dim, (ranks, x.shape[dim] // ranks)).movedim(dim, 0)


def _dimension(call: str, x: Tensor, dim: int) -> int:
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"{call}: dim is {dim}, but x has shape {list(x.shape)}; pass one of its dimensions")
    return dim % x.dim()


def _divisible(call: str, x: Tensor, dim: int, comm: Communicator) -> int:
    dim, ranks = _dimension(call, x, dim), comm.size
    size = x.shape[dim]
    if size % ranks:
        raise ValueError(
            f"{call}: dimension {dim} of x is {size}, not divisible by {ranks} ranks; pad it to "
            f"{-(-size // ranks) * ranks}"
        )
    return dim
