"""ops.rms_norm: root-mean-square norm with an optional residual addition in front, differentiable.

    forward   h = x + residual      rstd = 1 / sqrt(mean(h^2) + eps)      normed = h * rstd * weight
    backward  g = dnormed * weight  dh = rstd * (g - h * rstd^2 * mean(g * h)) + dh from the stream
              dweight = sum over rows of dnormed * h * rstd

Statistics are fp32 for low precision and fp64 for fp64. The implementation is plain torch on every device.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tpmp_kernels import reference
from tpmp_kernels.ops import backend, checks
from tpmp_kernels.ops._register import below_autograd, register, widest


def rms_norm(
    x: Tensor, weight: Tensor, *, residual: Tensor | None = None, eps: float = 1e-5
) -> Tensor | tuple[Tensor, Tensor]:
    """h / sqrt(mean(h^2) + eps) * weight over the last dimension, with h = x + residual.

    x and residual [..., H], weight [H] -> normed [..., H], or (normed, h) when there is a residual: h is the stream
    that the next layer adds to. Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019. Raises ValueError
    for shapes and devices, TypeError for dtypes.
    """
    if x.dim() == 0:
        raise ValueError("rms_norm: x must have at least one dimension, got a scalar; pass x of shape [..., H]")
    checks.shape("rms_norm", "weight", weight, x.shape[-1:])
    if residual is not None:
        checks.shape("rms_norm", "residual", residual, x.shape)
    checks.together("rms_norm", x, weight=weight, residual=residual)
    if backend.choose(x) == "reference":
        return reference.rms_norm(x, weight, residual=residual, eps=eps)
    normed, h, _ = _rms_norm(x, weight, residual, eps)
    return normed if residual is None else (normed, h)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _forward(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(normed, h, rstd [..., 1]); h is empty where there is no residual, since an output may not be an input."""
    h = x.contiguous() if residual is None else x.contiguous() + residual.contiguous()
    wide = h.to(_wide(x))
    rstd = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    normed = (wide * rstd).mul_(weight).to(x.dtype)
    return normed, h if residual is not None else x.new_empty(0), rstd


def _backward(
    dnormed: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """(dx, dweight); dx is the gradient of x and of the residual alike."""
    unit = h.to(_wide(h)).contiguous() * rstd
    upstream = dnormed.to(unit.dtype)
    dweight = (
        (upstream * unit).reshape(math.prod(h.shape[:-1]), h.shape[-1]).sum(0) if need_weight else unit.new_empty(0)
    )
    scaled = upstream * weight
    dx = (scaled - unit * (scaled * unit).mean(-1, keepdim=True)).mul_(rstd)
    dx = dx if dh is None else dx.add_(dh)
    return dx.to(h.dtype, memory_format=torch.contiguous_format), dweight.to(weight.dtype)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, residual, eps):
        with below_autograd():
            normed, h, rstd = _rms_norm(x, weight, residual, eps)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*([rstd, h] if residual is None else [rstd]))
        ctx.save_for_backward(x if residual is None else h, weight, rstd)
        ctx.has_residual = residual is not None
        return normed, h, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx, dnormed, dh, _):
        h, weight, rstd = ctx.saved_tensors
        need_x, need_weight, need_residual, _ = ctx.needs_input_grad
        if dnormed is None:
            dx, dweight = dh, None
        else:
            dx, dweight = _rms_norm_backward(dnormed, dh if ctx.has_residual else None, h, weight, rstd, need_weight)
        return dx if need_x else None, dweight if need_weight else None, dx if need_residual else None, None


def _fake(x, weight, residual, eps):
    h = x.new_empty(x.shape if residual is not None else 0)
    return x.new_empty(x.shape), h, x.new_empty(*x.shape[:-1], 1, dtype=_wide(x))


def _fake_backward(dnormed, dh, h, weight, rstd, need_weight):
    return h.new_empty(h.shape), weight.new_empty(weight.shape if need_weight else 0)


_rms_norm = register(
    "rms_norm(Tensor x, Tensor weight, Tensor? residual, float eps) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    function=_RmsNorm,
    autocast=widest,
)
_rms_norm_backward = register(
    "rms_norm_backward(Tensor dnormed, Tensor? dh, Tensor h, Tensor weight, Tensor rstd, bool need_weight)"
    " -> (Tensor, Tensor)",
    _backward,
    _fake_backward,
)
