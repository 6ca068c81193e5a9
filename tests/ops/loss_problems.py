"""Problems of ops.cross_entropy and ops.linear_cross_entropy: 15 tokens, 11 ids, 7 features."""

import torch
from problem import Inner, Problem
from torch import Tensor

# One token a row more than a problem has: a trace must not see that the slice of it is the whole.
TARGETS = torch.tensor([[3, 0, 8, -100, 2, 1], [7, 1, 3, 0, 6, 1], [5, 8, 4, 3, -100, 1]])
TARGET = TARGETS[:, :5]
FORMS = {
    "mean": {},
    "all-none": {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 2.0, "reduction": "none"},
    "padded-sum": {"vocab_size": 9, "label_smoothing": 0.2, "reduction": "sum"},
}


def _target(like: Tensor) -> Tensor:
    """For features or logits [3, S, *]. Ids are not differentiated, and so are no input of a problem."""
    if not isinstance(like, Tensor) or like.dim() < 2:
        return TARGET
    return TARGETS[:, : like.shape[1]].to("cuda" if like.is_cuda else "cpu")


def fields(*, vocab_size=11, label_smoothing=0.0, z_loss=0.0, softcap=None, reduction="mean") -> tuple:
    """The options of an op as its schema has them."""
    return 0, 0, vocab_size, label_smoothing, z_loss, softcap, -100, reduction


def _logits(form: str) -> Problem:
    return Problem(
        f"cross_entropy-{form}",
        "cross_entropy",
        ((3, 5, 11),),
        lambda room, z: room.cross_entropy(z, _target(z), **FORMS[form]),
        lambda z: (z, _target(z), *fields(**FORMS[form])),
    )


def _linear(form: str) -> Problem:
    return Problem(
        f"linear_cross_entropy-{form}",
        "linear_cross_entropy",
        ((3, 5, 7), (11, 7)),
        lambda room, x, w: room.linear_cross_entropy(x, w, _target(x), **FORMS[form]),
        lambda x, w: (x, w, _target(x), None, None, False, *fields(**FORMS[form])),
    )


LOSSES = [make(form) for make in (_linear, _logits) for form in FORMS]


def _drawn(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(14)
    return [torch.rand(shape, generator=generator) for shape in shapes]


def _of_logits(with_statistics: bool, form: str) -> tuple:
    z, statistics, dloss = _drawn((3, 5, 11), (3, 15), (3, 5))
    options = fields(**FORMS[form])
    if not with_statistics:
        return z, TARGET, *options
    return dloss if options[-1] == "none" else dloss[0, 0], z, TARGET, statistics, *options


def _of_features(extra: tuple, form: str, *, backward: bool = False) -> tuple:
    x, w, statistics, dloss = _drawn((3, 5, 7), (11, 7), (3, 15), (3, 5))
    options = fields(**FORMS[form])
    if not backward:
        return x, w, TARGET, *extra, *options
    return dloss if options[-1] == "none" else dloss[0, 0], x, w, TARGET, statistics, *extra, *options


def _inner(op: str, form: str, arguments) -> Inner:
    return Inner(f"{op}-{form}", op, arguments)


_FLAGS = ((True, True), (True, False), (False, True))
INNER = [
    *(_inner("cross_entropy_saved", f, lambda f=f: _of_logits(False, f)) for f in FORMS),
    *(_inner("cross_entropy_backward", f, lambda f=f: _of_logits(True, f)) for f in FORMS),
    *(_inner("linear_cross_entropy_saved", f, lambda f=f: _of_features((), f)) for f in FORMS),
    *(
        _inner(
            "linear_cross_entropy_backward", f"{f}{needed}",
            lambda f=f, n=needed: _of_features((*n, False), f, backward=True),
        )
        for f, needed in zip(FORMS, _FLAGS, strict=True)
    ),
    *(
        _inner(
            "linear_cross_entropy_with_gradients", f"{needed}{wide}",
            lambda n=needed, w=wide: _of_features((1.0, *n, w, False), "mean"),
        )
        for needed in _FLAGS
        for wide in (False, True)
    ),
]  # fmt: skip
