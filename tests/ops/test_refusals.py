"""Every public op with one argument made wrong: one sentence that names the op, before anything starts."""

import inspect
import itertools
from functools import partial

import pytest
import torch
from calls import Calls
from problems import PROBLEMS, Problem, flat

from tpmp_kernels import ops, reference


def one_larger(t: torch.Tensor) -> torch.Tensor:
    return torch.cat([t, t[..., :1]], -1)


# May make another valid call, which the reference then computes too.
RESHAPED = {
    "scalar": lambda t: t.flatten()[0],
    "another dimension": lambda t: t.unsqueeze(0),
    "one dimension less": lambda t: t[0],
    "one larger": one_larger,
    "empty": lambda t: t[..., :0],
    "none": lambda t: None,
}
# Never valid. Floating dtypes are no indices, and integers no numbers.
WRONG = {
    "other kind": lambda t: t.long() if t.is_floating_point() else t.float(),
    "bool": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64),
    "fp8": lambda t: t.to(torch.float8_e4m3fn),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "numpy": lambda t: t.numpy(),
    "list": lambda t: t.tolist(),
    "text": lambda t: "x",
}
SKIPPED = object()
each_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)


def fault(problem, call, expected=None) -> str | None:
    """What is wrong with how the call is refused: it must be in one sentence, "op: fault; remedy", before any op runs.

    `expected()` computes what the call must give where it is not refused.
    """
    with Calls() as calls:
        try:
            results = flat(call())
        except (ValueError, TypeError) as error:
            text = str(error)
            if calls.names:
                return f"refused after {calls.names} had run: {text}"
            right = text.startswith(f"{problem.op}: ") and ";" in text and "\n" not in text
            return None if right else f"refused with: {text}"
        except Exception as error:
            return f"raised {error!r}"
    if expected is None:
        return "accepted"
    try:
        torch.testing.assert_close(results, flat(expected()))
    except Exception as error:
        return f"accepted, but {error}"
    return None


def faults(problem, dtype: torch.dtype, changes: dict, *, may_be_valid: bool) -> list[str]:
    found = []
    for i, how in itertools.product(range(len(problem.shapes)), changes):
        inputs = problem.inputs(dtype)
        inputs[i] = changes[how](inputs[i])
        if inputs[i] is SKIPPED:
            continue
        expected = partial(problem.call, reference, *inputs) if may_be_valid else None
        what = fault(problem, partial(problem.call, ops, *inputs), expected)
        found += [f"argument {i}, {how}: {what}"] if what else []
    return found


@each_problem
def test_a_wrong_tensor_is_refused(problem):
    assert not faults(problem, torch.float32, WRONG, may_be_valid=False)


@each_problem
def test_another_shape_is_refused_or_computed(problem):
    assert not faults(problem, torch.float64, RESHAPED, may_be_valid=True)


@each_problem
def test_another_floating_dtype_is_refused(problem):
    if sum(t.is_floating_point() for t in problem.inputs(torch.float32)) == 1:
        pytest.skip("the only floating tensor sets the dtype")
    change = {"double": lambda t: t.double() if t.is_floating_point() else SKIPPED}
    assert not faults(problem, torch.float32, change, may_be_valid=False)


def _drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


# What a problem does not count among its inputs: op, call, the argument.
OTHERS = [
    ("cross_entropy", lambda room, t: room.cross_entropy(_drawn(3, 5, 11), t), torch.full((3, 5), 4)),
    (
        "linear_cross_entropy",
        lambda room, t: room.linear_cross_entropy(_drawn(3, 7), _drawn(4, 7), t),
        torch.ones(3).long(),
    ),
    (
        "rope",
        lambda room, t: room.rope(_drawn(3, 5, 2, 4), _drawn(3, 5, 2, 4), reference.rope_table(9, 4), t),
        torch.ones(3, 5).long(),
    ),
    ("rope", lambda room, t: room.rope(_drawn(3, 5, 2, 4), _drawn(3, 5, 2, 4), t), reference.rope_table(9, 4)),
]


@pytest.mark.parametrize(("op", "call", "argument"), OTHERS, ids=["target", "ids", "positions", "table"])
def test_another_argument_is_refused_likewise(op, call, argument):
    other = Problem("", op, ((),), call, lambda t: (t,))
    found = [fault(other, partial(call, ops, change(argument))) for change in WRONG.values()]
    reshaped = [change(argument) for change in RESHAPED.values()]
    found += [fault(other, partial(call, ops, t), partial(call, reference, t)) for t in reshaped]
    assert not [what for what in found if what]


def with_activation(problem, activation):
    """The problem's call with another activation."""

    class Room:
        def __getattr__(self, name):
            return lambda *args, **kwargs: getattr(ops, name)(*args, **{**kwargs, "activation": activation})

    return lambda: problem.call(Room(), *problem.inputs(torch.float32))


HAVE_ACTIVATION = [p for p in PROBLEMS if "activation" in inspect.signature(getattr(ops, p.op)).parameters]


@pytest.mark.parametrize("problem", HAVE_ACTIVATION, ids=lambda p: p.name)
@pytest.mark.parametrize("activation", ["tanh", "", 3, ["gelu"], torch.relu], ids=list("abcde"))
def test_an_unknown_activation_is_refused(problem, activation):
    assert not fault(problem, with_activation(problem, activation))
