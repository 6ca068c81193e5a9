"""Differentiable collectives: the two operators that make a layer tensor parallel, each the other's transpose.

| function     | forward    | backward   | where it stands                                       |
| ------------ | ---------- | ---------- | ----------------------------------------------------- |
| `copy`       | identity   | all-reduce | in front of column-parallel linears (dX is partial)   |
| `all_reduce` | all-reduce | identity   | behind row-parallel linears (Y is a partial sum)      |

Source: Shoeybi et al., Megatron-LM (arXiv 1909.08053), where they are called f and g.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tpmp_kernels.comm.communicator import Communicator


def copy(x: Tensor, comm: Communicator, *, tag: str = "") -> Tensor:
    """`x` itself; in backward the gradient is summed over the ranks of `comm`. `tag` names the call to peers."""
    return x if comm.size == 1 else _Copy.apply(x, comm, tag)


def all_reduce(x: Tensor, comm: Communicator, *, tag: str = "") -> Tensor:
    """The sum of `x` over the ranks of `comm`, a new tensor; in backward the gradient passes unchanged."""
    return x if comm.size == 1 else _AllReduce.apply(x, comm, tag)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, comm: Communicator, tag: str) -> Tensor:
        ctx.comm, ctx.tag = comm, tag
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return _summed(grad, ctx.comm, f"{ctx.tag}.grad"), None, None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, comm: Communicator, tag: str) -> Tensor:
        return _summed(x, comm, tag)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return grad, None, None


def _summed(x: Tensor, comm: Communicator, tag: str) -> Tensor:
    # A copy of its own: the collective works in place, and an argument of autograd is never written.
    return comm.all_reduce(x.detach().clone(memory_format=torch.contiguous_format), tag=tag)
