"""Norms over the last dimension, statistics in fp32 (fp64 for fp64)."""

import torch
from torch import Tensor


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
