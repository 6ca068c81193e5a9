"""The pieces of a linear outside Triton, in plain torch, and how any input becomes a matrix."""

import math

import torch
from torch import Tensor

from tpmp_kernels.ops.sharding import flattenable


def as_rows(x: Tensor) -> Tensor:
    """[..., K] -> [M, K]. The count is spelt out, since -1 is ambiguous where K is 0."""
    x = x if type(x) is Tensor else flattenable(x)
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def gemm(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias, nothing fused. x [M, K], weight [N, K] -> [M, N].

    On the CPU torch picks the library by dtype (oneDNN for bf16); calling oneDNN's linear for fp32 too was as fast.
    """
    return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


def activation_grad(dy: Tensor, z: Tensor, activation: str) -> Tensor:
    """dy * act'(z), by torch's own fused derivatives, in a new contiguous tensor."""
    dy = dy.contiguous()
    if activation == "silu":
        return torch.ops.aten.silu_backward(dy, z)
    if activation == "relu":
        return torch.ops.aten.threshold_backward(dy, z, 0)
    if activation == "relu2":
        return torch.relu(z).mul_(2).mul_(dy)
    return torch.ops.aten.gelu_backward(dy, z, approximate="tanh" if activation == "gelu_tanh" else "none")
