"""Random calls of an op for hypothesis: a family is a function that draws sizes and tensors and returns a Case.

    @family
    def my_op(d: Draw) -> Case:
        rows, n = d.leading(), d.size()
        x, bias = d.tensor(*rows, n), d.maybe(n)
        return Case([x, bias], lambda room, x, bias: room.my_op(x, bias))

Sizes include 0, 1 and primes; tensors come dense, transposed, with every second element, with stride 0, or behind an
offset, in one dtype for a case, and lie among NaN. test_properties.py checks every family.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from bounds import UNIT, linear_bound
from case import Case
from hypothesis import strategies as st
from torch import Tensor

from tpmp_kernels import reference

SIZES = [0, 1, 2, 3, 7, 13, 16, 31, 64, 97]
LAYOUTS = ["dense", "transposed", "every second", "stride 0", "offset"]
ACTIVATIONS = list(reference.ACTIVATIONS)
GATES = list(reference.GATES)


class Draw:
    """What a family draws from: hypothesis' choices, and a generator seeded by it for the numbers."""

    def __init__(self, draw: Callable):
        self._draw = draw
        self.dtype = draw(st.sampled_from(list(UNIT)))
        self._generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def one_of(self, choices: Sequence) -> Any:
        return self._draw(st.sampled_from(list(choices)))

    def size(self, least: int = 0) -> int:
        return self.one_of([size for size in SIZES if size >= least])

    def leading(self) -> list[int]:
        """Leading dimensions: none, one, or two of which the first is small."""
        return self.one_of([lambda: [], lambda: [self.size()], lambda: [self.one_of([1, 2, 3]), self.size()]])()

    def tensor(self, *shape: int) -> Tensor:
        return self._laid_out(torch.randn(shape, generator=self._generator, dtype=torch.float64).to(self.dtype))

    def maybe(self, *shape: int) -> Tensor | None:
        return self.tensor(*shape) if self.one_of([True, False]) else None

    def indices(self, end: int, *shape: int) -> Tensor:
        """Integers from 0 up to `end`, which is at least 1."""
        return self._laid_out(torch.randint(end, shape, generator=self._generator))

    def _laid_out(self, tensor: Tensor) -> Tensor:
        layout = self.one_of(LAYOUTS) if tensor.dim() else "dense"
        if layout == "transposed":
            return tensor.transpose(0, -1).contiguous().transpose(0, -1)
        if layout == "stride 0":
            return tensor[:1].expand(tensor.shape) if tensor.numel() else tensor
        if layout == "every second":
            return _among_nan(tensor, (*tensor.shape[:-1], 2 * tensor.shape[-1]))[..., ::2].copy_(tensor)
        if layout == "offset":
            return _among_nan(tensor, (tensor.shape[0] + 1, *tensor.shape[1:]))[1:].copy_(tensor)
        return tensor


def _among_nan(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    surroundings = torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    return torch.full(shape, surroundings, dtype=tensor.dtype)


FAMILIES: dict[str, Callable[[Draw], Case]] = {}


def family(cases: Callable[[Draw], Case]) -> Callable[[Draw], Case]:
    FAMILIES[cases.__name__] = cases
    return cases


@family
def linear(d: Draw) -> Case:
    rows, n, k, activation = d.leading(), d.size(), d.size(), d.one_of([None, *ACTIVATIONS])
    x, weight, bias, residual = d.tensor(*rows, k), d.tensor(n, k), d.maybe(n), d.maybe(*rows, n)
    again = d.one_of([True, False])
    return Case(
        [x, weight, bias, residual],
        lambda room, x, w, b, r: room.linear(x, w, b, activation=activation, residual=r, save_preact=not again),
        lambda: linear_bound(x, weight, bias, activation=activation, residual=residual, unfused=True),
    )


@family
def gated_linear(d: Draw) -> Case:
    rows, n, k, activation = d.leading(), d.size(), d.size(), d.one_of(GATES)
    x, gate, up = d.tensor(*rows, k), d.tensor(n, k), d.tensor(n, k)

    def bound() -> tuple[Tensor, Tensor]:
        """The product of two linears, each within its own bound, rounded."""
        (a, a_error), (b, b_error) = (
            linear_bound(x, w, activation=act, unfused=True) for w, act in ((gate, activation), (up, None))
        )
        error = a.abs() * b_error + b.abs() * a_error + a_error * b_error
        out, info = UNIT[d.dtype], torch.finfo(d.dtype)
        return a * b, error + 2 * out * ((a * b).abs() + error) + info.smallest_normal * info.eps

    return Case([x, gate, up], lambda room, x, g, u: room.gated_linear(x, g, u, activation=activation), bound)


@family
def mlp(d: Draw) -> Case:
    rows, n, k, hidden, activation = d.leading(), d.size(), d.size(), d.size(), d.one_of(ACTIVATIONS)
    up, down, b_up, b_down = d.tensor(hidden, k), d.tensor(n, hidden), d.maybe(hidden), d.maybe(n)
    again = d.one_of([True, False])
    return Case(
        [d.tensor(*rows, k), up, down, b_up, b_down],
        lambda room, *tensors: room.mlp(*tensors, activation=activation, save_preact=not again),
    )


@family
def gated_mlp(d: Draw) -> Case:
    rows, n, k, hidden, activation = d.leading(), d.size(), d.size(), d.size(), d.one_of(GATES)
    again = d.one_of([True, False])
    return Case(
        [d.tensor(*rows, k), d.tensor(hidden, k), d.tensor(hidden, k), d.tensor(n, hidden)],
        lambda room, *tensors: room.gated_mlp(*tensors, activation=activation, save_preact=not again),
    )


@family
def dgrad(d: Draw) -> Case:
    rows, n, k = d.leading(), d.size(), d.size()
    dz, weight = d.tensor(*rows, n), d.tensor(n, k)
    return Case([dz, weight], lambda room, dz, w: room.dgrad(dz, w), lambda: linear_bound(dz, weight.t()))


@family
def wgrad(d: Draw) -> Case:
    rows, n, k = d.leading(), d.size(), d.size()
    dz, x = d.tensor(*rows, n), d.tensor(*rows, k)

    def bound() -> tuple[Tensor, Tensor]:
        return linear_bound(dz.reshape(-1, n).t() if dz.numel() else dz.new_zeros(n, 0), x.reshape(-1, k).t())

    return Case([dz, x], lambda room, dz, x: room.wgrad(dz, x), bound if dz.numel() and x.numel() else None)


@family
def rms_norm(d: Draw) -> Case:
    rows, hidden, eps = d.leading(), d.size(least=3), d.one_of([1e-5, 1e-2])
    return Case(
        [d.tensor(*rows, hidden), d.tensor(hidden), d.maybe(*rows, hidden)],
        lambda room, x, weight, residual: room.rms_norm(x, weight, residual=residual, eps=eps),
    )


@family
def layer_norm(d: Draw) -> Case:
    rows, hidden, eps = d.leading(), d.size(least=3), d.one_of([1e-5, 1e-2])
    return Case(
        [d.tensor(*rows, hidden), d.tensor(hidden), d.maybe(hidden), d.maybe(*rows, hidden)],
        lambda room, x, weight, bias, residual: room.layer_norm(x, weight, bias, residual=residual, eps=eps),
    )


@family
def glu(d: Draw) -> Case:
    shape, activation = [*d.leading(), d.size()], d.one_of(GATES)
    return Case([d.tensor(*shape), d.tensor(*shape)], lambda room, gate, up: room.glu(gate, up, activation=activation))


@family
def rope(d: Draw) -> Case:
    batch, sequence, half, rest = d.one_of([0, 1, 3]), d.size(), d.one_of([1, 2, 3, 16, 31]), d.one_of([0, 0, 1, 5])
    table = reference.rope_table(100, 2 * half)
    shape = d.one_of([None, [sequence], [batch, sequence]])
    position_ids = None if shape is None else d.indices(100, *shape)
    q, k = (d.tensor(batch, sequence, heads, 2 * half + rest) for heads in (d.one_of([1, 3, 8]), d.one_of([1, 2])))
    return Case([q, k], lambda room, q, k: room.rope(q, k, table, position_ids))


def loss_options(d: Draw, columns: int) -> dict[str, Any]:
    """Of a loss over that many columns; no mean, which may be over no token.

    Two classes at least: the gradient of a single one is all cancellation, as is that of a norm over one element.
    """
    return {
        "vocab_size": max(2, columns - d.one_of([0, 0, 1, 5])),
        "label_smoothing": d.one_of([0.0, 0.1, 1.0]),
        "z_loss": d.one_of([0.0, 1e-3]),
        "softcap": d.one_of([None, 3.0]),
        "ignore_index": d.one_of([-100, 0]),
        "reduction": d.one_of(["none", "sum"]),
    }


@family
def cross_entropy(d: Draw) -> Case:
    rows, columns = d.leading(), d.size(least=2)
    options = loss_options(d, columns)
    target = d.indices(options["vocab_size"], *rows)
    return Case([d.tensor(*rows, columns)], lambda room, z: room.cross_entropy(z, target, **options))


@family
def linear_cross_entropy(d: Draw) -> Case:
    rows, columns, k = d.leading(), d.size(least=2), d.size()
    options = loss_options(d, columns)
    target = d.indices(options["vocab_size"], *rows)
    return Case(
        [d.tensor(*rows, k), d.tensor(columns, k)],
        lambda room, x, w: room.linear_cross_entropy(x, w, target, **options),
    )
