"""What each op is asked in a comparison: random operands of a shape, the call, and peers that do the same.

`call(room, *operands)` runs the op of a room: tpmp_kernels.ops, or tpmp_kernels.reference, which is plain torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tpmp_kernels.bench.work import gemm_flop

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


@dataclass(frozen=True)
class Problem:
    """One op at one shape. `draw(dtype, device, seed)` gives operands; floating ones are differentiated."""

    op: str
    case: str
    draw: Callable[[torch.dtype, str, int], tuple[Tensor, ...]]
    call: Callable[..., Any]
    flop: int | None = None  # of the forward's GEMMs
    peers: Mapping[str, Callable[..., Any]] = field(default_factory=dict)  # name -> call(*operands)
    forms: Mapping[str, Callable[..., Any]] = field(default_factory=dict)  # other forms of ours, call(room, *operands)


def problem(op: str, shape: tuple[int, ...], activation: str | None = None) -> Problem:
    return _MAKERS[op](*shape, *([activation] if op in _ACTIVATED else []))


def operands(*shapes: tuple[int, ...]) -> Callable[[torch.dtype, str, int], tuple[Tensor, ...]]:
    """Standard normal, and matrices behind the first one at the scale of a trained layer's weights."""

    def draw(dtype: torch.dtype, device: str, seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(seed)

        def one(position: int, shape: tuple[int, ...]) -> Tensor:
            scale = shape[-1] ** -0.5 if position and len(shape) == 2 else 1.0
            return (scale * torch.randn(shape, generator=generator, device=device)).to(dtype)

        return tuple(one(i, shape) for i, shape in enumerate(shapes))

    return draw


def _linear(m: int, n: int, k: int, activation: str | None) -> Problem:
    return Problem(
        "linear",
        "linear+bias" + f"+{activation}" * (activation is not None),
        operands((m, k), (n, k), (n,)),
        lambda room, x, w, b: room.linear(x, w, b, activation=activation),
        gemm_flop(m, n, k),
    )


def _gated_linear(m: int, n: int, k: int, activation: str) -> Problem:
    return Problem(
        "gated_linear",
        f"gated_linear {activation}",
        operands((m, k), (n, k), (n, k)),
        lambda room, x, gate, up: room.gated_linear(x, gate, up, activation=activation),
        2 * gemm_flop(m, n, k),
    )


def _mlp(m: int, f: int, h: int, activation: str) -> Problem:
    return Problem(
        "mlp",
        f"mlp {activation}",
        operands((m, h), (f, h), (h, f), (f,), (h,)),
        lambda room, x, up, down, b_up, b_down: room.mlp(x, up, down, b_up, b_down, activation=activation),
        2 * gemm_flop(m, f, h),
    )


def _gated_mlp(m: int, f: int, h: int, activation: str) -> Problem:
    return Problem(
        "gated_mlp",
        f"gated_mlp {activation}",
        operands((m, h), (f, h), (f, h), (h, f)),
        lambda room, x, gate, up, down: room.gated_mlp(x, gate, up, down, activation=activation),
        3 * gemm_flop(m, f, h),
    )


def _targets(draw: Callable, tokens: int, vocab: int) -> Callable:
    def with_targets(dtype: torch.dtype, device: str, seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(seed + 1)
        return (*draw(dtype, device, seed), torch.randint(vocab, (tokens,), generator=generator, device=device))

    return with_targets


def _linear_cross_entropy(t: int, v: int, h: int) -> Problem:
    peers = {}
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13
        peers["F.linear_cross_entropy"] = F.linear_cross_entropy  # whole logits, as in eager
        chunked = torch.nn.LinearCrossEntropyOptions()
        peers["F.linear_cross_entropy chunked"] = partial(F.linear_cross_entropy, options=chunked)
    return Problem(
        "linear_cross_entropy",
        "linear_cross_entropy",
        _targets(operands((t, h), (v, h)), t, v),
        lambda room, x, w, target: room.linear_cross_entropy(x, w, target),
        gemm_flop(t, v, h),
        peers,
        {"in forward": lambda room, x, w, target: room.linear_cross_entropy(x, w, target, grad_scale=1.0)},
    )


def _cross_entropy(t: int, v: int) -> Problem:
    return Problem(
        "cross_entropy",
        "cross_entropy",
        _targets(operands((t, v)), t, v),
        lambda room, logits, target: room.cross_entropy(logits, target),
    )


def _rms_norm(m: int, h: int) -> Problem:
    return Problem(
        "rms_norm",
        "rms_norm+residual",
        operands((m, h), (h,), (m, h)),
        lambda room, x, w, residual: room.rms_norm(x, w, residual=residual),
    )


def _layer_norm(m: int, h: int) -> Problem:
    return Problem(
        "layer_norm",
        "layer_norm+residual",
        operands((m, h), (h,), (h,), (m, h)),
        lambda room, x, w, b, residual: room.layer_norm(x, w, b, residual=residual),
    )


def _rope(b: int, s: int, q: int, k: int, d: int) -> Problem:
    tables: dict[str, Tensor] = {}  # by device: made once, outside what is timed

    def call(room, queries, keys):
        device = str(queries.device)
        if device not in tables:
            tables[device] = room.rope_table(s, d, device=device)
        return room.rope(queries, keys, tables[device])

    return Problem("rope", "rope", operands((b, s, q, d), (b, s, k, d)), call)


def _glu(m: int, f: int, activation: str) -> Problem:
    draw = operands((1, m, f), (1, m, f))
    return Problem("glu", f"glu {activation}", draw, lambda room, gate, up: room.glu(gate, up, activation=activation))


_MAKERS = {
    "linear": _linear,
    "gated_linear": _gated_linear,
    "mlp": _mlp,
    "gated_mlp": _gated_mlp,
    "linear_cross_entropy": _linear_cross_entropy,
    "cross_entropy": _cross_entropy,
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "rope": _rope,
    "glu": _glu,
}
_ACTIVATED = ("linear", "gated_linear", "mlp", "gated_mlp", "glu")
