"""Problems of ops.linear and ops.gated_linear."""

import torch
from problem import Inner, Problem


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


LINEARS = [_linear(a) for a in (None, "gelu", "gelu_tanh", "silu", "relu", "relu2")]
LINEARS += [_linear(None, bias=False, residual=False), _linear("gelu", residual=False), _linear(None, bias=False)]
GATED = [_gated(a) for a in ("silu", "gelu", "gelu_tanh")]


def _drawn(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(12)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def _dz_arguments(transposed: bool, bias: bool) -> tuple:
    dy, z = _drawn((3, 5, 11), (3, 5, 11))
    return (dy.transpose(0, 1).contiguous().transpose(0, 1) if transposed else dy), z, "gelu", bias


INNER = [
    Inner(
        "linear_with_preact",
        "linear_with_preact",
        lambda: (*_drawn((3, 5, 7), (11, 7), (11,), (3, 5, 11)), "gelu"),
    ),
    *(
        Inner(f"linear_dz{'-transposed' * t}{'-bias' * b}", "linear_dz", lambda t=t, b=b: _dz_arguments(t, b))
        for t in (False, True)
        for b in (False, True)
    ),
    Inner(
        "gated_linear_with_preact",
        "gated_linear_with_preact",
        lambda: (*_drawn((3, 5, 7), (11, 7), (11, 7)), "silu"),
    ),
    Inner("gated_linear_dz", "gated_linear_dz", lambda: (*_drawn((3, 5, 11), (3, 5, 11), (3, 5, 11)), "silu")),
]
