"""How far from the fp64 oracle a kernel may be: a theorem for any order of summation, never a chosen tolerance."""

import torch
from torch import Tensor

from tpmp_kernels import reference

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# Evaluating act itself in the accumulator's precision: exp, erf and a few products, each within a few units.
ACTIVATION_UNITS = 16


def gamma(terms: int, unit: float) -> float:
    return terms * unit / (1 - terms * unit)


def linear_bound(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    unit: float | None = None,
    unfused: bool = False,
) -> tuple[Tensor, Tensor]:
    """(R, bound): act(x @ weight^T + bias) + residual in fp64, and the largest error that rounding can explain.

    `unit` is the output's round-off (the dtype's by default). `unfused`: z and act(z) are rounded to the dtype too.
    """
    out = UNIT[x.dtype] if unit is None else unit
    accumulator = UNIT[torch.promote_types(x.dtype, torch.float32)]
    tiny = torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
    x, weight, bias, residual = (None if t is None else t.double() for t in (x, weight, bias, residual))
    z = reference.linear(x, weight, bias)
    size = reference.linear(x.abs(), weight.abs(), None if bias is None else bias.abs())
    error = gamma(x.shape[-1] + 2, accumulator) * size
    if unfused:
        error = error + out * (z.abs() + error) + tiny
    y = reference.activate(z, activation)
    if activation is not None:
        slope = 2 * (z.abs() + error) if activation == "relu2" else 1.13  # the largest |act'|
        error = slope * error + ACTIVATION_UNITS * accumulator * (z.abs() + y.abs())
    if unfused:
        error = error + out * (y.abs() + error) + tiny
    if residual is not None:
        error = error + accumulator * (y.abs() + residual.abs())
        y = y + residual
    return y, error + out * (y.abs() + error) + tiny


def assert_within(got: Tensor, oracle: Tensor, bound: Tensor) -> None:
    assert got.shape == oracle.shape, f"shape {list(got.shape)}, expected {list(oracle.shape)}"
    largest = torch.finfo(got.dtype).max
    # Where the value is past the dtype's range, its infinity is right too.
    right = (got == oracle.sign() * torch.inf) & (oracle.abs() + bound > largest)
    assert (got.isfinite() | right).all(), "not finite"
    excess = ((got.double() - oracle).abs() - bound).masked_fill(right, 0).flatten()
    worst = int(excess.argmax()) if excess.numel() else 0
    assert (excess <= 0).all(), f"element {worst}: error above its bound by {excess[worst]:.3e}"


def assert_no_worse_than_torch(
    got: Tensor, torch_result: Tensor, oracle: Tensor, unit: float | None = None, *, least: int = 1000
) -> None:
    """max|got - R| <= 2 max|torch - R| + u max|R|. Not asked of fewer than `least` elements: torch may be lucky."""
    if oracle.numel() < least:
        return
    unit = UNIT[got.dtype] if unit is None else unit
    ours, theirs = (float((t.double() - oracle).abs().max()) for t in (got, torch_result))
    assert ours <= 2 * theirs + unit * float(oracle.abs().max()), f"error {ours:.3e}, torch's {theirs:.3e}"
