"""Norms, rotary embedding and gates in fp64, and the largest error that rounding can explain; see bounds.py.

Each function returns (oracle, bound). u is the round-off of the arithmetic, fp32 or wider, `unit` that of the result
(its dtype's by default).
"""

import torch
from bounds import ACTIVATION_UNITS, UNIT, gamma
from torch import Tensor

from tpmp_kernels import reference


def _wide(dtype: torch.dtype) -> float:
    return UNIT[torch.promote_types(dtype, torch.float32)]


def _rounded(oracle: Tensor, error: Tensor, dtype: torch.dtype, unit: float | None) -> tuple[Tensor, Tensor]:
    """The bound of a result with `error` before it is rounded to dtype."""
    info = torch.finfo(dtype)
    out = UNIT[dtype] if unit is None else unit
    return oracle, error + out * (oracle.abs() + error) + info.smallest_normal * info.eps


def norm_bound(
    h: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, centered: bool, unit: float | None = None
) -> tuple[Tensor, Tensor]:
    """(h - mean) / sqrt(var + eps) * weight + bias of the stored h [M, N]; without mean for the RMS norm."""
    dtype, u, n = h.dtype, _wide(h.dtype), h.shape[-1]
    h, weight = h.double(), weight.double()
    mean = h.mean(-1, keepdim=True) if centered else torch.zeros_like(h[:, :1])
    mean_error = gamma(n + 2, u) * h.abs().mean(-1, keepdim=True) if centered else mean
    deviation = h - mean
    deviation_error = mean_error + u * (deviation.abs() + mean_error)
    variance = deviation.square().mean(-1, keepdim=True)
    largest = (deviation.abs() + deviation_error).square().mean(-1, keepdim=True)
    variance_error = largest - variance + gamma(n + 3, u) * largest
    scale = (variance + eps).rsqrt()
    # sqrt halves a relative error, but not where it is of order 1; 6 roundings of its own.
    scale_error = scale * (variance_error / (variance + eps) + 6 * u)
    y = deviation * scale * weight
    error = weight.abs() * (deviation.abs() * scale_error + deviation_error * (scale + scale_error)) + 3 * u * y.abs()
    if bias is not None:
        y = y + bias.double()
        error = error + u * y.abs()
    return _rounded(y, error, dtype, unit)


def norm_gradient_bounds(
    dnormed: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    *,
    unit: float | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Of dx, dweight and dbias, for the mean and rstd [M, 1] that are given."""
    dtype, u, (m, n) = h.dtype, _wide(h.dtype), h.shape
    upstream, weight, factor = dnormed.double(), weight.double(), rstd.double()
    unit_row = (h.double() - (0 if mean is None else mean.double())) * factor
    g = upstream * weight
    along, level = (g * unit_row).mean(-1, keepdim=True), g.mean(-1, keepdim=True)
    sums = unit_row.abs() * (g * unit_row).abs().mean(-1, keepdim=True)
    dx, parts = g - unit_row * along, g.abs() + sums
    if mean is not None:
        dx, parts = dx - level, parts + g.abs().mean(-1, keepdim=True)
    dx, error = dx * factor, gamma(n + 10, u) * parts * factor
    if dh is not None:
        dx, error = dx + dh.double(), error + 2 * u * (dx.abs() + dh.double().abs())
    products = upstream * unit_row
    return [
        _rounded(dx, error, dtype, unit),
        _rounded(products.sum(0), gamma(m + 5, u) * products.abs().sum(0), dtype, unit),
        _rounded(upstream.sum(0), gamma(m + 1, u) * upstream.abs().sum(0), dtype, unit),
    ]


def rope_bound(
    x: Tensor, table: Tensor, position_ids: Tensor | None, *, inverse: bool = False, unit: float | None = None
) -> tuple[Tensor, Tensor]:
    """x [B, S, H, D] turned by the rows of `table`."""
    half = table.shape[1] // 2
    cos, sin = table.double()[:, :half], table.double()[:, half:] * (-1 if inverse else 1)
    x, dtype = x.double(), x.dtype
    turned, _ = reference.rope(x, x, torch.cat((cos, sin), dim=-1), position_ids)
    # |a| |cos| + |b| |sin|, then the same of the other half.
    size, _ = reference.rope(x.abs(), x.abs(), torch.cat((cos.abs(), -sin.abs()), dim=-1), position_ids)
    other, _ = reference.rope(x.abs(), x.abs(), torch.cat((cos.abs(), sin.abs()), dim=-1), position_ids)
    error = 3 * _wide(dtype) * torch.cat((size[..., :half], other[..., half : 2 * half], 0 * x[..., 2 * half :]), -1)
    return _rounded(turned, error, dtype, unit)


def glu_bounds(
    dy: Tensor, gate: Tensor, up: Tensor, activation: str, *, unit: float | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Of y, dgate and dup, computed in fp32 and rounded once."""
    dtype, u = gate.dtype, ACTIVATION_UNITS * _wide(gate.dtype)
    dy, gate, up = dy.double(), gate.double(), up.double()
    act, slope = reference.activate(gate, activation), reference.activation_derivative(gate, activation)
    act_error = u * (gate.abs() + act.abs())
    return [
        _rounded(act * up, act_error * up.abs(), dtype, unit),
        _rounded(dy * up * slope, u * (dy * up).abs(), dtype, unit),
        _rounded(dy * act, act_error * dy.abs(), dtype, unit),
    ]
