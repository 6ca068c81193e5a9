"""Linears whose collective runs under their GEMM. W [N, K], R ranks.

| function              | x [M, K]  | weight [N, K] | y [M, N]  | forward              | backward                     |
| --------------------- | --------- | ------------- | --------- | -------------------- | ---------------------------- |
| linear_all_reduce     | X_shard_k | W_shard_k     | Y         | GEMM, all-reduce     | dgrad; wgrad                 |
| copy_linear           | X         | W_shard_n     | Y_shard_n | GEMM                 | dgrad, all-reduce; wgrad     |
| linear_reduce_scatter | X_shard_k | W_shard_k     | Y_shard_m | GEMM, reduce-scatter | all-gather, dgrad; wgrad     |
| all_gather_linear     | X_shard_m | W_shard_n     | Y_shard_n | all-gather, GEMM     | dgrad, reduce-scatter; wgrad |

What a comma joins goes chunk by chunk: the collective of one chunk is on the link while the next is multiplied. wgrad
follows, under what is still on the link. The first two, and the last two, are each other's duals: backward of one is
forward of the other. all_gather_linear keeps X_shard_m alone and gathers X again for wgrad, first of all on the link.
x of the first two may be [.., K].

mode: "none", one GEMM and then one collective; "chunked", in `chunks` or as many as the cost rule likes best; "auto",
what the rule of plan.py says, from `rates` (rates.py). Every rank passes the same. With one rank they are ops.linear.
Raises ValueError for shapes and modes, TypeError for dtypes and kinds of tensors, TransportError where a peer fails or
calls something else. Differentiable once; a weight's `main_grad` is added to as by ops.linear. Bias and activation
belong behind the reduction, and to the caller.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function

from tpmp_kernels import ops
from tpmp_kernels.comm.communicator import Communicator
from tpmp_kernels.comm.overlap.chunks import Pass
from tpmp_kernels.comm.overlap.explain import plan_of
from tpmp_kernels.comm.overlap.functions import AllReduced, Copied, Gathered, Scattered
from tpmp_kernels.comm.overlap.rates import Rates
from tpmp_kernels.ops import checks
from tpmp_kernels.ops.main_grad import slot


def linear_all_reduce(
    x: Tensor,
    weight: Tensor,
    comm: Communicator,
    *,
    mode: str = "auto",
    chunks: int | None = None,
    rates: Rates | None = None,
    tag: str = "",
) -> Tensor:
    """Y [.., N] = sum over ranks of X_shard_k [.., K/R] @ W_shard_k^T. See the head of the file."""
    return _call(AllReduced, "linear_all_reduce", x, [weight], comm, mode, chunks, rates, tag)[0]


def copy_linear(
    x: Tensor,
    weight: Tensor,
    comm: Communicator,
    *,
    mode: str = "auto",
    chunks: int | None = None,
    rates: Rates | None = None,
    tag: str = "",
) -> Tensor:
    """Y_shard_n [.., N/R] = X [.., K] @ W_shard_n^T, whose dX is summed over the ranks. See the head of the file."""
    return _call(Copied, "copy_linear", x, [weight], comm, mode, chunks, rates, tag)[0]


def linear_reduce_scatter(
    x: Tensor,
    weight: Tensor,
    comm: Communicator,
    *,
    mode: str = "auto",
    chunks: int | None = None,
    rates: Rates | None = None,
    tag: str = "",
) -> Tensor:
    """Y_shard_m [M/R, N], this rank's rows of linear_all_reduce's Y. x is a matrix, and R divides its rows."""
    return _call(Scattered, "linear_reduce_scatter", x, [weight], comm, mode, chunks, rates, tag)[0]


def all_gather_linear(
    x_shard_m: Tensor,
    weight: Tensor,
    comm: Communicator,
    *,
    mode: str = "auto",
    chunks: int | None = None,
    rates: Rates | None = None,
    tag: str = "",
) -> Tensor:
    """Y_shard_n [M, N/R] = X @ W_shard_n^T, X being the X_shard_m [M/R, K] of all ranks. x_shard_m is a matrix."""
    return _call(Gathered, "all_gather_linear", x_shard_m, [weight], comm, mode, chunks, rates, tag)[0]


def copy_linears(x: Tensor, weights: Sequence[Tensor], comm: Communicator, **how) -> tuple[Tensor, ...]:
    """copy_linear of one x with each of the weights; one sum of all their dX travels. Options as there."""
    return _call(Copied, "copy_linear", x, weights, comm, **_OPTIONS | how)


def all_gather_linears(x_shard_m: Tensor, weights: Sequence[Tensor], comm: Communicator, **how) -> tuple[Tensor, ...]:
    """all_gather_linear of one x_shard_m with each of the weights, gathered once. Options as there."""
    return _call(Gathered, "all_gather_linear", x_shard_m, weights, comm, **_OPTIONS | how)


_OPTIONS = {"mode": "auto", "chunks": None, "rates": None, "tag": ""}


def _call(
    function: type[Function],
    name: str,
    x: Tensor,
    weights: Sequence[Tensor],
    comm: Communicator,
    mode: str,
    chunks: int | None,
    rates: Rates | None,
    tag: str,
) -> tuple[Tensor, ...]:
    for weight in weights:
        checks.weight(name, "weight", weight, x)
        checks.together(name, x, weight=weight)
        _check_plain(name, x, weight)
    device, slots = x.device.type, [slot(weight) for weight in weights]
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x, *weights = (t.to(torch.get_autocast_dtype(device)) for t in (x, *weights))
    shapes = [weight.shape for weight in weights]
    plan = plan_of(name, x.shape, shapes, x.dtype, comm, mode=mode, chunks=chunks, rates=rates, device=device)
    if comm.size == 1:
        return tuple(ops.linear(x, weight) for weight in weights)
    with torch.autocast(device, enabled=False):  # all is cast; the ops' own GEMMs are below autocast too
        results = function.apply(Pass(comm, plan, tag or name), slots, x, *weights)
    return results if isinstance(results, tuple) else (results,)


def _check_plain(name: str, *tensors: Tensor) -> None:
    for tensor in tensors:
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            raise TypeError(f"{name}: expected plain tensors, got {type(tensor).__name__}; pass its local tensor")
