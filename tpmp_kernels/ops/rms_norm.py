"""ops.rms_norm: root-mean-square norm with an optional residual addition in front, differentiable.

    forward   h = x + residual      rstd = 1 / sqrt(mean(h^2) + eps)      normed = h * rstd * weight
    backward  g = dnormed * weight  dh = rstd * (g - h * rstd^2 * mean(g * h)) + dh from the stream
              dweight = sum over rows of dnormed * h * rstd

Statistics are fp32 for low precision and fp64 for fp64; every result is rounded once.
"""

import torch
from torch import Tensor

from tpmp_kernels import reference
from tpmp_kernels.ops import backend, checks
from tpmp_kernels.ops._register import below_autograd, register, widest
from tpmp_kernels.ops.plain import as_rows
from tpmp_kernels.ops.sharding import cut


def rms_norm(
    x: Tensor, weight: Tensor, *, residual: Tensor | None = None, eps: float = 1e-5
) -> Tensor | tuple[Tensor, Tensor]:
    """h / sqrt(mean(h^2) + eps) * weight over the last dimension, with h = x + residual.

    x and residual [..., H], weight [H] -> normed [..., H], or (normed, h) when there is a residual: h is the stream
    that the next layer adds to. Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019. Raises ValueError
    for shapes and devices, TypeError for dtypes.
    """
    checks.norm("rms_norm", x, weight, None, residual)
    if backend.choose(x) == "reference":
        return reference.rms_norm(x, weight, residual=residual, eps=eps)
    normed, h, _ = _rms_norm(x, weight, residual, eps)
    return normed if residual is None else (normed, h)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _forward(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(normed, h, rstd [..., 1]); h is empty where there is no residual, since an output may not be an input."""
    if backend.choose(x) == "triton":
        from tpmp_kernels.kernels import norms as kernel

        flat = None if residual is None else as_rows(residual)
        normed, h, _, rstd = kernel.norm(as_rows(x), weight, None, flat, eps, centered=False)
    else:
        h = x.contiguous() if residual is None else x.contiguous() + residual.contiguous()
        wide = h.to(_wide(x))
        rstd = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        normed = (wide * rstd).mul_(weight).to(x.dtype)
    h = x.new_empty(0) if residual is None else h.view(x.shape)
    return normed.view(x.shape), h, rstd.view(*x.shape[:-1], 1)


def _backward(
    dnormed: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """(dx, dweight), the latter empty where not needed; dx is the gradient of x and of the residual alike."""
    if backend.choose(h) == "triton":
        from tpmp_kernels.kernels import norms as kernel

        dx, dweight, _ = kernel.norm_backward(
            as_rows(dnormed), None if dh is None else as_rows(dh), as_rows(h), weight, None, rstd,
            need_weight=need_weight, need_bias=False,
        )  # fmt: skip
        dx = dx.view(h.shape)
    else:
        unit = h.to(_wide(h)).contiguous() * rstd
        upstream = dnormed.to(unit.dtype)
        scratch = upstream * unit
        dweight = as_rows(scratch).sum(0) if need_weight else None
        along = scratch.mul_(weight).mean(-1, keepdim=True)
        dx = torch.mul(upstream, weight, out=scratch).sub_(unit.mul_(along)).mul_(rstd)
        dx = (dx if dh is None else dx.add_(dh)).to(h.dtype, memory_format=torch.contiguous_format)
    return dx, weight.new_empty(0) if dweight is None else dweight.to(weight.dtype)


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


def _sharding(x, weight, residual, eps):
    outputs = "*h, -, *r" if residual is None else "*h, *h, *r"
    return cut(f"*h, h, *h -> {outputs}", "*")(x, weight, residual, eps)


_rms_norm = register(
    "rms_norm(Tensor x, Tensor weight, Tensor? residual, float eps) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    function=_RmsNorm,
    autocast=widest,
    sharding=_sharding,
)
_rms_norm_backward = register(
    "rms_norm_backward(Tensor dnormed, Tensor? dh, Tensor h, Tensor weight, Tensor rstd, bool need_weight)"
    " -> (Tensor, Tensor)",
    _backward,
    _fake_backward,
    sharding=cut("*h, *h, *h, h, *r -> *h, h", "*"),
)
