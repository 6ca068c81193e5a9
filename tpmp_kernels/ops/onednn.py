"""oneDNN's fused linears, as torch's CPU build carries them: one GEMM with an activation or a second operand after it.

These are the operators that torch.compile's CPU backend emits. They have no gradient and no fp64; `serves` says
where they stand in for plain torch.
"""

from functools import lru_cache

import torch
from torch import Tensor

# Name of the activation -> (attr, algorithm). relu2 is relu, then a square in place.
_FUSED = {
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "silu": ("swish", ""),
    "relu": ("relu", ""),
    "relu2": ("relu", ""),
}


@lru_cache
def _dtypes() -> frozenset[torch.dtype]:
    """The dtypes for which this build of torch, on this CPU, has the fused linears in native speed and precision."""
    operators = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(operators, "_linear_pointwise"):
        return frozenset()
    has_bf16 = operators._is_mkldnn_bf16_supported()
    return frozenset({torch.float32, torch.bfloat16} if has_bf16 else {torch.float32})


def serves(x: Tensor, weight: Tensor, activation: str | None) -> bool:
    """Whether the fused linears take x [M, K] and weight [N, K] (dense, not empty, fp32 or bf16, on the CPU) and are
    faster than torch's GEMM with a pass in place behind it. In fp32 MKL's GEMM gains more than fusing saves, but for
    gelu_tanh, of which torch's own pass takes a fifth of the GEMM's time at K = 768."""
    return (
        x.device.type == "cpu"
        and x.dtype in _dtypes()
        and (x.dtype is torch.bfloat16 or activation == "gelu_tanh" or not torch.backends.mkl.is_available())
        and x.numel() > 0
        and weight.numel() > 0
        and weight.is_contiguous()
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """act(x @ weight^T + bias) in one pass. x [M, K], weight [N, K] -> [M, N]."""
    attr, algorithm = _FUSED[activation]
    y = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, _dense(bias), attr, [], algorithm)
    return y.square_() if activation == "relu2" else y


def linear_with(x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor, operation: str) -> Tensor:
    """(x @ weight^T + bias) + other, or * other for operation "mul", in one pass. other [M, N] is only read."""
    return torch.ops.mkldnn._linear_pointwise.binary(
        x.contiguous(), other.contiguous(), weight, _dense(bias), operation
    )


def _dense(bias: Tensor | None) -> Tensor | None:
    """These operators read a bias as if its stride were 1."""
    return None if bias is None else bias.contiguous()
