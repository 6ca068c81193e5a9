"""Round steps for an axis, and numbers in few digits."""

import math


def round_step(least: float) -> float:
    """The smallest of 1, 2 or 5 times a power of ten that is at least `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * 0.999)


def ticks(span: float, step: float) -> list[float]:
    """0, step, 2 step ... up to span."""
    return [tick * step for tick in range(math.floor(span / step + 1e-9) + 1)]


def short(value: float) -> str:
    """Four significant digits, without an exponent for large numbers."""
    return f"{float(value):.4g}" if abs(value) < 1e4 else f"{float(value):.0f}"
