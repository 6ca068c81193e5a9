"""The pieces of a linear outside Triton, in plain torch, and how any input becomes a matrix.

Which CPU library is fast was measured; see benchmarks/suites/test_kernels.py. torch's own fp32 GEMM is MKL's on x86,
5 to 7 % faster than oneDNN's. bf16 GEMMs are oneDNN's, and slow on some CPUs (`fast_bf16`): there operands are widened
for the product, which is then rounded once.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from tpmp_kernels.ops.sharding import flattenable

# Widening passes over operands and result once, the product over all of them many times.
_LEAST_REUSE = 40  # of M N K / (M K + K N + M N)

_IN_PLACE = {
    "gelu": torch.ops.aten.gelu_,
    "gelu_tanh": lambda z: torch.ops.aten.gelu_(z, approximate="tanh"),
    "silu": lambda z: F.silu(z, inplace=True),
    "relu": torch.relu_,
    "relu2": lambda z: torch.relu_(z).square_(),
}


def as_rows(x: Tensor) -> Tensor:
    """[..., K] -> [M, K]. The count is spelt out, since -1 is ambiguous where K is 0."""
    x = x if type(x) is Tensor else flattenable(x)
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


@lru_cache
def fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 faster than fp32: with AMX, or AVX512-BF16 at full rate as on AMD's cores.

    Intel's cores with AVX512-FP16 (since Sapphire Rapids) have AMX for that, and where a virtual machine hides it,
    AVX512-BF16 reaches half the fp32 rate (83 against 160 GFLOP/s on one).
    """
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(found.get("amx_bf16")) or not found.get("avx512_fp16")


def widens(a: Tensor, b: Tensor) -> bool:
    """Whether a [M, K] @ b [K, N] is faster with both in fp32."""
    if a.dtype is not torch.bfloat16 or a.device.type != "cpu" or fast_bf16():
        return False
    (m, k), n = a.shape, b.shape[1]
    return m * n * k > _LEAST_REUSE * (m * k + k * n + m * n)


def mm(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] @ b [K, N] -> [M, N], for any device."""
    return torch.mm(a.float(), b.float()).to(a.dtype) if widens(a, b) else torch.mm(a, b)


def sum_of_products(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """a @ b + c @ d, shapes as in `mm`."""
    if widens(a, b):
        return torch.mm(a.float(), b.float()).addmm_(c.float(), d.float()).to(a.dtype)
    return torch.mm(a, b).addmm_(c, d)


def gemm(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias, nothing fused. x [M, K], weight [N, K] -> [M, N]."""
    if widens(x, weight.t()):
        return wide_gemm(x, weight, bias).to(x.dtype)
    return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


def wide_gemm(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`gemm` of widened operands, in fp32."""
    product = torch.mm(x.float(), weight.t().float())
    return product if bias is None else product.add_(bias)


def activate_(z: Tensor, activation: str | None) -> Tensor:
    """act(z), in z's memory."""
    return z if activation is None else _IN_PLACE[activation](z)


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
