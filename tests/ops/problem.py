"""What a problem is: a call of an op's public function, the raw op, and fresh inputs. problems.py lists them all."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """`call(room, *tensors)` runs the public op of `room` (ops, reference); `raw(*tensors)` are the op's arguments."""

    name: str
    op: str
    shapes: tuple[tuple[int, ...], ...]
    call: Callable[..., Any]
    raw: Callable[..., tuple]

    def inputs(self, dtype: torch.dtype, *, layout: str = "contiguous", requires_grad: bool = False) -> list[Tensor]:
        generator = torch.Generator().manual_seed(11)
        made = [
            _laid_out(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype), layout) for s in self.shapes
        ]
        return [t.requires_grad_(requires_grad) for t in made]


@dataclass(frozen=True)
class Inner:
    """An op that only an autograd.Function calls: it has no gradient of its own. `arguments()` are fresh."""

    name: str
    op: str
    arguments: Callable[[], tuple]


def _laid_out(tensor: Tensor, layout: str) -> Tensor:
    if layout == "contiguous":
        return tensor
    if layout == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan, dtype=tensor.dtype)
    return wide[..., ::2].copy_(tensor)


def flat(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]
