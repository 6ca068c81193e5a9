"""The kernels of the losses in fp64, and the largest error that rounding can explain; see bounds.py."""

import torch
from bounds import UNIT
from torch import Tensor

_U = UNIT[torch.float32]
# tanh and its derivative by one exponential, a quotient and a product, each within a few units; 1 - exp magnifies four
# times what is just too large for the series.
_CAP_UNITS = 24


def _capped(z: Tensor, softcap: float | None, off: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(z, how far the capped logits may be off, the cap's derivative), for logits that may be `off` themselves."""
    off = torch.zeros_like(z) if off is None else off
    if softcap is None:
        return z, off, torch.ones_like(z)
    t = (z / softcap).tanh()
    return softcap * t, off + _CAP_UNITS * _U * ((softcap * t).abs() + off), 4 / (2 * (z / softcap).cosh()) ** 2


def statistics_bounds(
    z: Tensor, target: Tensor, first: int, softcap: float | None, *, steps: int, off: Tensor | None = None
) -> list[tuple[Tensor, Tensor]]:
    """(oracle, bound), [M] each, of peak, others, target's logit and shortfall, made in `steps` pieces.

    `off`: how far from z the kernel's logits may be, which are a product of its own.
    """
    z, off, _ = _capped(z.double(), softcap, off)
    n, is_target = z.shape[1], torch.arange(first, first + z.shape[1], device=z.device) == target[:, None]
    peak = z.amax(1)
    exponentials = (z - peak[:, None]).exp().masked_fill(is_target, 0)
    others = exponentials.sum(1)
    # exp(x) is off by |x| and its own units; each new peak rescales the sum.
    spread = z.amax(1) - z.amin(1)
    relative = (4 * spread + n + 8 * steps + 16) * _U + (2 * off.amax(1)).expm1()
    shortfall = (peak[:, None] - z).sum(1)
    target_logit = z.masked_fill(~is_target, 0).sum(1)
    return [
        (peak, off.amax(1)),
        (others, relative * others + n * torch.finfo(torch.float32).smallest_normal),
        (target_logit, off.masked_fill(~is_target, 0).sum(1)),
        (shortfall, (n + 4 * steps + 4) * _U * shortfall + off.sum(1) + n * off.amax(1)),
    ]


def gradient_bound(
    z: Tensor,
    target: Tensor,
    first: int,
    peak: Tensor,
    scale: Tensor,
    target_scale: Tensor,
    truth: Tensor,
    shift: Tensor | None,
    softcap: float | None,
    *,
    unit: float,
    dtype: torch.dtype,
    off: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(oracle, bound), [M, N], for the numbers of each row that are given; `unit`: round-off of the result's dtype.

    `off` as in `statistics_bounds`.
    """
    # The logarithm of the cap's derivative changes by at most 2 / cap times the change of z.
    steeper = 0 if off is None or softcap is None else (2 / softcap * off).expm1()
    z, off, slope = _capped(z.double(), softcap, off)
    raw = 0 if softcap is None else (z / softcap).clamp(-1, 1).atanh().abs().clamp(max=1e3)
    is_target = torch.arange(first, first + z.shape[1], device=z.device) == target[:, None]
    peak, scale, target_scale, truth = (t.double()[:, None] for t in (peak, scale, target_scale, truth))
    x = z - peak
    risen = x.exp() * torch.where(is_target, target_scale, scale)
    taken = torch.where(is_target, truth, 0) + (0 if shift is None else shift.double()[:, None])
    d = (risen - taken) * slope
    error = risen.abs() * ((3 * x.abs() + 8) * _U + (2 * off).expm1()) + 4 * _U * (risen.abs() + taken.abs())
    error = (error + (_CAP_UNITS + 16 * raw) * _U * (d / slope.clamp(min=1e-300)).abs()) * slope
    error = error + (d.abs() + error) * steeper
    info, narrow = torch.finfo(torch.float32), torch.finfo(dtype)
    tiny = info.smallest_normal + narrow.smallest_normal * narrow.eps
    return d, error + unit * (d.abs() + error) + tiny
