"""One small problem for each op: a call of its public function, the raw op, and fresh inputs."""

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


def _laid_out(tensor: Tensor, layout: str) -> Tensor:
    if layout == "contiguous":
        return tensor
    if layout == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan, dtype=tensor.dtype)
    return wide[..., ::2].copy_(tensor)


def _linear(activation: str | None, bias: bool = True, residual: bool = True) -> Problem:
    shapes = ((3, 5, 7), (11, 7)) + ((11,),) * bias + ((3, 5, 11),) * residual

    def split(x, w, *rest):
        rest = list(rest)
        return x, w, rest.pop(0) if bias else None, rest.pop(0) if residual else None

    def call(room, *tensors):
        x, w, b, r = split(*tensors)
        return room.linear(x, w, b, activation=activation, residual=r)

    name = f"linear-{activation}" + "-bias" * bias + "-residual" * residual
    return Problem(name, "linear", shapes, call, lambda *t: (*split(*t), activation))


def _gated(activation: str) -> Problem:
    return Problem(
        f"gated_linear-{activation}",
        "gated_linear",
        ((3, 5, 7), (11, 7), (11, 7)),
        lambda room, x, g, u: room.gated_linear(x, g, u, activation=activation),
        lambda x, g, u: (x, g, u, activation),
    )


RMS_NORM = Problem(
    "rms_norm",
    "rms_norm",
    ((3, 5, 7), (7,)),
    lambda room, x, w: room.rms_norm(x, w, eps=1e-4),
    lambda x, w: (x, w, None, 1e-4),
)
ADD_RMS_NORM = Problem(
    "rms_norm-residual",
    "rms_norm",
    ((3, 5, 7), (7,), (3, 5, 7)),
    lambda room, x, w, r: room.rms_norm(x, w, residual=r),
    lambda x, w, r: (x, w, r, 1e-5),
)
LINEARS = [_linear(a) for a in (None, "gelu", "gelu_tanh", "silu", "relu", "relu2")]
LINEARS += [_linear(None, bias=False, residual=False), _linear("gelu", residual=False), _linear(None, bias=False)]
GATED = [_gated(a) for a in ("silu", "gelu", "gelu_tanh")]
PROBLEMS = [*LINEARS, *GATED, RMS_NORM, ADD_RMS_NORM]


def flat(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]
