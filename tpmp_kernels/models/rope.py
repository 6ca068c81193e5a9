"""Rotary position embedding in the half-split form of Hugging Face's Llama (Su et al., RoFormer, arXiv 2104.09864)."""

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=8)
def rotary_table(sequence: int, head_size: int, theta: float, *, dtype: torch.dtype, device: torch.device):
    """(cos, sin), each [S, D/2]; angles are computed in fp64, because fp32 loses digits at large positions."""
    frequency = theta ** (-torch.arange(0, head_size, 2, dtype=torch.float64, device=device) / head_size)
    angle = torch.outer(torch.arange(sequence, dtype=torch.float64, device=device), frequency)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotary(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x [.., S, D]: element i of the first half of D is paired with element i of the second."""
    cos, sin = table
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
