"""ops.layer_norm: layer norm with an optional residual addition in front, differentiable.

    forward   h = x + residual      unit = (h - mean(h)) / sqrt(var(h) + eps)      normed = unit * weight + bias
    backward  g = dnormed * weight  dh = rstd * (g - mean(g) - unit * mean(g * unit)) + dh from the stream
              dweight = sum over rows of dnormed * unit        dbias = sum over rows of dnormed

Statistics are fp32 for low precision and fp64 for fp64; every result is rounded once.
"""

import torch
from torch import Tensor

from tpmp_kernels import reference
from tpmp_kernels.ops import backend, checks
from tpmp_kernels.ops._register import below_autograd, register, widest
from tpmp_kernels.ops.plain import as_rows
from tpmp_kernels.ops.sharding import cut

_BLOCK = 1 << 16  # elements of the backward in plain torch that stay in the cache


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: Tensor | None = None, eps: float = 1e-5
) -> Tensor | tuple[Tensor, Tensor]:
    """(h - mean(h)) / sqrt(var(h) + eps) * weight + bias over the last dimension, with h = x + residual.

    x and residual [..., H], weight and bias [H] -> normed [..., H], or (normed, h) when there is a residual: h is the
    stream that the next layer adds to. Ba, Kiros and Hinton, "Layer Normalization", 2016. Raises ValueError for
    shapes and devices, TypeError for dtypes.
    """
    checks.norm("layer_norm", x, weight, bias, residual)
    if backend.choose(x) == "reference":
        return reference.layer_norm(x, weight, bias, residual=residual, eps=eps)
    normed, h, _, _ = _layer_norm(x, weight, bias, residual, eps)
    return normed if residual is None else (normed, h)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(normed, h, mean, rstd), the last two [..., 1]; h is empty where there is no residual: no output is an input."""
    if backend.choose(x) == "triton":
        from tpmp_kernels.kernels import norms as kernel

        flat = None if residual is None else as_rows(residual)
        normed, h, mean, rstd = kernel.norm(as_rows(x), weight, bias, flat, eps, centered=True)
    else:
        h = x.contiguous() if residual is None else x.contiguous() + residual.contiguous()
        wide = _wide(x)
        # Wide parameters make the CPU's own keep wide statistics beside narrow rows; elsewhere the rows must be wide.
        normed, mean, rstd = torch.native_layer_norm(
            h if h.is_cpu else h.to(wide), weight.shape, weight.to(wide), None if bias is None else bias.to(wide), eps
        )
        normed = normed.to(x.dtype)
    h = x.new_empty(0) if residual is None else h.view(x.shape)
    return normed.view(x.shape), h, mean.view(*x.shape[:-1], 1), rstd.view(*x.shape[:-1], 1)


def _backward(
    dnormed: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias), the last two empty where not needed; dx is the gradient of x and of the residual alike."""
    if backend.choose(h) == "triton":
        from tpmp_kernels.kernels import norms as kernel

        dx, dweight, dbias = kernel.norm_backward(
            as_rows(dnormed), None if dh is None else as_rows(dh), as_rows(h), weight, mean, rstd,
            need_weight=need_weight, need_bias=need_bias,
        )  # fmt: skip
        dx = dx.view(h.shape)
    else:
        rows = (None if t is None else as_rows(t) for t in (dnormed, dh, h, mean, rstd))
        dx, dweight, dbias = _by_blocks(*rows, weight, need_weight, need_bias)
        dx = dx.view(h.shape)
    return dx, *(weight.new_empty(0) if d is None else d.to(weight.dtype) for d in (dweight, dbias))


def _by_blocks(
    dnormed: Tensor,
    dh: Tensor | None,
    h: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias) of matrices, in plain torch, a block of rows in the cache at a time.

    The sums over rows are not left to torch's own backward: it adds row by row, with 20 times the error at 16384 rows,
    and in another order for another number of threads.
    """
    (count, width), wide = h.shape, _wide(h)
    size = max(16, _BLOCK // max(1, width))
    begins, scale, dx = range(0, count, size), weight.to(wide), h.new_empty(h.shape)
    dweights, dbiases = (h.new_empty(len(begins), width, dtype=wide) if n else None for n in (need_weight, need_bias))
    for i, begin in enumerate(begins):
        block = slice(begin, begin + size)
        # torch reads mean and rstd as if they were dense, whatever their strides.
        upstream, rows, *statistics = (t[block].to(wide).contiguous() for t in (dnormed, h, mean, rstd))
        grad = torch.ops.aten.native_layer_norm_backward(
            upstream, rows, weight.shape, *statistics, scale, None, [True, False, False]
        )[0]
        dx[block] = grad if dh is None else grad.add_(dh[block])
        if need_weight:
            unit = torch.sub(rows, statistics[0], out=grad).mul_(statistics[1])
            torch.sum(unit.mul_(upstream), 0, out=dweights[i])
        if need_bias:
            torch.sum(upstream, 0, out=dbiases[i])
    return dx, dweights.sum(0) if need_weight else None, dbiases.sum(0) if need_bias else None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, eps):
        with below_autograd():
            normed, h, mean, rstd = _layer_norm(x, weight, bias, residual, eps)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*([mean, rstd, h] if residual is None else [mean, rstd]))
        ctx.save_for_backward(x if residual is None else h, weight, mean, rstd)
        ctx.has_residual = residual is not None
        return normed, h, mean, rstd

    @staticmethod
    def backward(ctx, dnormed, dh, *_):
        h, weight, mean, rstd = ctx.saved_tensors
        need_x, need_weight, need_bias, need_residual, _ = ctx.needs_input_grad
        dx, dweight, dbias = dh, None, None
        if dnormed is not None:
            stream = dh if ctx.has_residual else None
            dx, dweight, dbias = _layer_norm_backward(dnormed, stream, h, weight, mean, rstd, need_weight, need_bias)
        return (
            dx if need_x else None,
            dweight if need_weight else None,
            dbias if need_bias else None,
            dx if need_residual else None,
            None,
        )


def _fake(x, weight, bias, residual, eps):
    h = x.new_empty(x.shape if residual is not None else 0)
    mean, rstd = (x.new_empty(*x.shape[:-1], 1, dtype=_wide(x)) for _ in range(2))
    return x.new_empty(x.shape), h, mean, rstd


def _fake_backward(dnormed, dh, h, weight, mean, rstd, need_weight, need_bias):
    sums = (weight.new_empty(weight.shape if needed else 0) for needed in (need_weight, need_bias))
    return h.new_empty(h.shape), *sums


def _sharding(x, weight, bias, residual, eps):
    outputs = "*h, -, *r, *r" if residual is None else "*h, *h, *r, *r"
    return cut(f"*h, h, h, *h -> {outputs}", "*")(x, weight, bias, residual, eps)


_layer_norm = register(
    "layer_norm(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    function=_LayerNorm,
    autocast=widest,
    sharding=_sharding,
)
_layer_norm_backward = register(
    "layer_norm_backward(Tensor dnormed, Tensor? dh, Tensor h, Tensor weight, Tensor mean, Tensor rstd,"
    " bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    sharding=cut("*h, *h, *h, h, *r, *r -> *h, h, h", "*"),
)
