"""Problems of the linear family: linear, gated_linear, mlp, gated_mlp, dgrad, wgrad."""

import torch
from problem import Inner, Problem


def _linear(activation: str | None, bias: bool = True, residual: bool = True, save_preact: bool = True) -> Problem:
    shapes = ((3, 5, 7), (11, 7)) + ((11,),) * bias + ((3, 5, 11),) * residual

    def split(x, w, *rest):
        rest = list(rest)
        return x, w, rest.pop(0) if bias else None, rest.pop(0) if residual else None

    def call(room, *tensors):
        x, w, b, r = split(*tensors)
        return room.linear(x, w, b, activation=activation, residual=r, save_preact=save_preact)

    name = f"linear-{activation}" + "-bias" * bias + "-residual" * residual + "-again" * (not save_preact)
    return Problem(name, "linear", shapes, call, lambda *t: (*split(*t), None, None, activation, None, save_preact))


def _gated(activation: str, save_preact: bool = True) -> Problem:
    return Problem(
        f"gated_linear-{activation}" + "-again" * (not save_preact),
        "gated_linear",
        ((3, 5, 7), (11, 7), (11, 7)),
        lambda room, x, g, u: room.gated_linear(x, g, u, activation=activation, save_preact=save_preact),
        lambda x, g, u: (x, g, u, None, None, None, None, activation, save_preact),
    )


def _mlp(activation: str, bias: bool, save_preact: bool) -> Problem:
    shapes = ((3, 5, 7), (11, 7), (6, 11), *((11,), (6,)) * bias)
    return Problem(
        f"mlp-{activation}" + "-bias" * bias + "-again" * (not save_preact),
        "mlp",
        shapes,
        lambda room, *t: room.mlp(*t, activation=activation, save_preact=save_preact),
        lambda x, u, d, *b: (x, u, d, *(b or (None, None)), None, None, activation, save_preact),
    )


def _gated_mlp(activation: str, save_preact: bool) -> Problem:
    return Problem(
        f"gated_mlp-{activation}" + "-again" * (not save_preact),
        "gated_mlp",
        ((3, 5, 7), (11, 7), (11, 7), (6, 11)),
        lambda room, *t: room.gated_mlp(*t, activation=activation, save_preact=save_preact),
        lambda *t: (*t, None, None, None, activation, save_preact),
    )


LINEARS = [_linear(a) for a in (None, "gelu", "gelu_tanh", "silu", "relu", "relu2")]
LINEARS += [_linear(None, bias=False, residual=False), _linear("gelu", residual=False), _linear(None, bias=False)]
LINEARS += [_linear("gelu", save_preact=False), _linear("silu", bias=False, residual=False, save_preact=False)]
GATED = [_gated(a) for a in ("silu", "gelu", "gelu_tanh")] + [_gated("silu", save_preact=False)]
MLPS = [_mlp(a, bias, save) for a, bias, save in (("gelu", True, True), ("relu2", False, True), ("silu", True, False))]
MLPS += [_gated_mlp("silu", True), _gated_mlp("gelu", False)]
SPLIT = [
    Problem("dgrad", "dgrad", ((3, 5, 11), (11, 7)), lambda room, dz, w: room.dgrad(dz, w), lambda dz, w: (dz, w)),
    Problem("wgrad", "wgrad", ((3, 5, 11), (3, 5, 7)), lambda room, dz, x: room.wgrad(dz, x), lambda dz, x: (dz, x)),
]
# The forms of one op that differ in what they keep for backward.
AGAIN = [
    (_linear("gelu"), _linear("gelu", save_preact=False)),
    (_linear("silu", bias=False, residual=False), _linear("silu", bias=False, residual=False, save_preact=False)),
    (_gated("silu"), _gated("silu", save_preact=False)),
    (_mlp("gelu", True, True), _mlp("gelu", True, False)),
    (_gated_mlp("silu", True), _gated_mlp("silu", False)),
]


def _drawn(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(12)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def _dz_arguments(transposed: bool, bias: bool) -> tuple:
    dy, z = _drawn((3, 5, 11), (3, 5, 11))
    return (dy.transpose(0, 1).contiguous().transpose(0, 1) if transposed else dy), z, "gelu", None, bias


def _inner(op: str, *shapes: tuple[int, ...], then: tuple = (), form: str = "") -> Inner:
    return Inner(op + form, op, lambda: (*_drawn(*shapes), *then))


X, W, B, Y, D, H = (3, 5, 7), (11, 7), (11,), (3, 5, 11), (6, 11), (15, 11)
INNER = [
    _inner("linear_with_preact", X, W, B, Y, then=("gelu", None)),
    _inner("linear_preact", X, W, B, then=("gelu", True, None)),
    *(
        Inner(f"linear_dz{'-transposed' * t}{'-bias' * b}", "linear_dz", lambda t=t, b=b: _dz_arguments(t, b))
        for t in (False, True)
        for b in (False, True)
    ),
    _inner("linear_dz", Y, Y, then=("gelu", torch.bfloat16, False), form="-narrowed"),
    _inner("linear_dbias", H),
    _inner("gated_linear_with_preact", X, W, W, then=("silu",)),
    _inner("gated_linear_preact", X, W, W, then=("silu",)),
    _inner("gated_linear_dz", Y, Y, Y, then=("silu",)),
    _inner("mlp_with_preact", X, W, D, B, (6,), then=("gelu",)),
    _inner("mlp_dz", (15, 6), D, H, then=("gelu", True, True)),
    _inner("mlp_dz", (15, 6), D, H, then=("gelu", False, False), form="-dz-alone"),
    _inner("gated_mlp_with_preact", X, W, W, D, then=("silu",)),
    _inner("gated_mlp_dz", (15, 6), D, H, H, then=("silu", True)),
    _inner("gated_mlp_dz", (15, 6), D, H, H, then=("silu", False), form="-dz-alone"),
    _inner("wgrad_into", Y, X, W, then=(None,)),
]
