"""The op behind ops.grad_norm, which is no problem of its own: it has no gradient and returns a scalar."""

import torch
from problem import Inner


def _arguments(dim: int | None, leaves: int) -> tuple:
    return torch.randn(6, 7, 4, generator=torch.Generator().manual_seed(15)), dim, leaves


INNER = [
    Inner("square_sums", "square_sums", lambda: _arguments(None, 1)),
    Inner("square_sums-leaves", "square_sums", lambda: _arguments(2, 4)),
]
