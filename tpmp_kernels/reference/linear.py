"""Linear layers, one torch call after the other. Whether pre-activations are saved changes nothing here."""

import torch
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
    out_dtype: torch.dtype | None = None,
    save_preact: bool = True,
    tap: Tensor | None = None,
) -> Tensor:
    """act(x @ weight^T + bias) + residual. x [..., K], weight [N, K], bias [N], residual [..., N] -> [..., N].

    out_dtype: everything is done in it. tap [..., N]: zeros added to the pre-activation, whose weight and bias then
    have no gradient.
    """
    if out_dtype is not None:
        x, weight, bias, residual, tap = (
            None if t is None else t.to(out_dtype) for t in (x, weight, bias, residual, tap)
        )
    y = activate(_linear(x, weight, bias, tap), activation)
    return y if residual is None else y + residual


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, tap: Tensor | None) -> Tensor:
    if tap is None:
        return F.linear(x, weight, bias)
    return F.linear(x, weight.detach(), None if bias is None else bias.detach()) + tap


def gated_linear(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    *,
    activation: str = "silu",
    save_preact: bool = True,
    taps: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """act(x @ w_gate^T) * (x @ w_up^T). x [..., K], w_gate and w_up [N, K] -> [..., N]; taps as linear's, for each."""
    tap_gate, tap_up = (None, None) if taps is None else taps
    return activate(_linear(x, w_gate, None, tap_gate), activation) * _linear(x, w_up, None, tap_up)


def mlp(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    *,
    activation: str = "gelu",
    save_preact: bool = True,
) -> Tensor:
    """act(x @ w_up^T + b_up) @ w_down^T + b_down. x [..., K], w_up [F, K], w_down [N, F] -> [..., N]."""
    return linear(linear(x, w_up, b_up, activation=activation), w_down, b_down)


def gated_mlp(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, *, activation: str = "silu", save_preact: bool = True
) -> Tensor:
    """(act(x @ w_gate^T) * (x @ w_up^T)) @ w_down^T. x [..., K], w_gate, w_up [F, K], w_down [N, F] -> [..., N]."""
    return linear(gated_linear(x, w_gate, w_up, activation=activation), w_down)


def dgrad(dz: Tensor, weight: Tensor) -> Tensor:
    """dz @ weight, the input gradient of a linear. dz [..., N], weight [N, K] -> [..., K]."""
    return dz @ weight


def wgrad(dz: Tensor, x: Tensor, *, main_grad: Tensor | None = None) -> Tensor | None:
    """dz^T @ x over all leading dimensions, the weight gradient of a linear; added to main_grad where there is one.

    dz [..., N], x [..., K] -> [N, K].
    """
    product = torch.einsum("...n,...k->nk", dz, x)
    if main_grad is None:
        return product
    with torch.no_grad():
        main_grad.add_(product)
    return None
