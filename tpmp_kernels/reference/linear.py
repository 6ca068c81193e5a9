"""Linear layers, one torch call after the other."""

import torch.nn.functional as F
from torch import Tensor

from tpmp_kernels.reference.activations import activate


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """act(x @ weight^T + bias) + residual. x [..., K], weight [N, K], bias [N], residual [..., N] -> [..., N]."""
    y = activate(F.linear(x, weight, bias), activation)
    return y if residual is None else y + residual


def gated_linear(x: Tensor, w_gate: Tensor, w_up: Tensor, *, activation: str = "silu") -> Tensor:
    """act(x @ w_gate^T) * (x @ w_up^T). x [..., K], w_gate and w_up [N, K] -> [..., N]."""
    return activate(F.linear(x, w_gate), activation) * F.linear(x, w_up)
