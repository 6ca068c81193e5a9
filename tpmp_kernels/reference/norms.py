"""Norms over the last dimension, statistics in fp32 (fp64 for fp64).

With a residual they return (normed, h), h = x + residual. h is rounded to x's dtype first, since that is the stream the
next layer sees; the rest is computed wide and rounded once at the end.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(
    x: Tensor, weight: Tensor, *, residual: Tensor | None = None, eps: float = 1e-5
) -> Tensor | tuple[Tensor, Tensor]:
    """h / sqrt(mean(h^2) + eps) * weight. x [..., H], weight [H] -> [..., H]."""
    h = x if residual is None else x + residual
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = (wide * rstd * weight.to(wide.dtype)).to(h.dtype)
    return normed if residual is None else (normed, h)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: Tensor | None = None, eps: float = 1e-5
) -> Tensor | tuple[Tensor, Tensor]:
    """(h - mean(h)) / sqrt(var(h) + eps) * weight + bias. x [..., H], weight and bias [H] -> [..., H]."""
    h = x if residual is None else x + residual
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    bias = None if bias is None else bias.to(wide.dtype)
    normed = F.layer_norm(wide, weight.shape, weight.to(wide.dtype), bias, eps).to(h.dtype)
    return normed if residual is None else (normed, h)
