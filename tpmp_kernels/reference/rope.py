"""Rotary position embedding: elements i and i + D/2 of a head are one complex number, turned by an angle that grows
with the position (Su et al., "RoFormer", 2021), in the half-split form of Hugging Face's Llama."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Llama3Scaling:
    """The rule of Llama 3.1 for contexts longer than `original_positions`, by wavelength in positions.

    Longer than original_positions / low_freq_factor: stretched by `factor`. Shorter than original_positions /
    high_freq_factor: kept. Between the two the frequency is interpolated.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192


def rope_table(
    positions: int,
    dim: int,
    *,
    theta: float = 10000.0,
    scaling: Llama3Scaling | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """[P, D]: cos of position * theta^(-2i/D) in the first half of D, sin in the second."""
    frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
    if scaling is not None:
        wavelengths = scaling.original_positions * frequency / (2 * math.pi)  # that fit the original context
        span = scaling.high_freq_factor - scaling.low_freq_factor
        kept = ((wavelengths - scaling.low_freq_factor) / span).clamp(0.0, 1.0)
        frequency = (1.0 - kept) * frequency / scaling.factor + kept * frequency
    angle = torch.arange(positions, dtype=torch.float64, device=device).unsqueeze(1) * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1).to(dtype)


def rope(q: Tensor, k: Tensor, table: Tensor, position_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """q [B, S, Hq, D] and k [B, S, Hk, D], each position turned by its row of `table` [P, R]; the D - R last dims stay.

    position_ids [B, S] or [S] choose the rows, by default 0..S-1. Computed in fp32 (fp64 for fp64), rounded once.
    """
    rows = table[: q.shape[1]] if position_ids is None else table[position_ids]
    cos, sin = rows.unsqueeze(-2).chunk(2, dim=-1)
    return _turned(q, cos, sin), _turned(k, cos, sin)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    a, b, rest = x.to(torch.promote_types(x.dtype, torch.float32)).tensor_split((half, 2 * half), dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1).to(x.dtype)
