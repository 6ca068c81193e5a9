"""The unfused reference: every op of `tpmp_kernels.ops` under the same name and signature, in plain torch.

The oracle of tests, benchmarks and `tpmp verify`. Gradients are torch's own autograd. Nothing here is tuned: each
function is the definition, one torch call after the other.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "relu2": lambda z: F.relu(z).square(),
}
GATES = ("silu", "gelu", "gelu_tanh")


def activate(z: Tensor, activation: str | None) -> Tensor:
    """act(z), elementwise; None is the identity."""
    return z if activation is None else ACTIVATIONS[activation](z)


def activation_derivative(z: Tensor, activation: str | None) -> Tensor:
    """act'(z), elementwise, from autograd: the oracle for hand-written derivatives."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        (derivative,) = torch.autograd.grad(activate(leaf, activation).sum(), leaf)
    return derivative


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


def rms_norm(
    x: Tensor, weight: Tensor, *, residual: Tensor | None = None, eps: float = 1e-5
) -> Tensor | tuple[Tensor, Tensor]:
    """h / sqrt(mean(h^2) + eps) * weight with h = x + residual. x [..., H], weight [H] -> [..., H].

    With a residual returns (normed, h). Computed in fp32 (fp64 for fp64) and rounded once at the end; h is rounded
    to x's dtype first, since that is the stream the next layer sees.
    """
    h = x if residual is None else x + residual
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = (wide * rstd * weight.to(wide.dtype)).to(h.dtype)
    return normed if residual is None else (normed, h)
