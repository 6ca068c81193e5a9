"""At home in torch: opcheck with gradients, autocast, and inputs left alone. test_compile.py is about torch.compile."""

import random

import pytest
import torch
from problems import ADD_RMS_NORM, GATED, INNER, LINEARS, PROBLEMS, RMS_NORM, flat

from tpmp_kernels import ops, reference
from tpmp_kernels.ops._register import AUTOCAST

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
each_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
# One of each kind, where a case takes long.
a_few = pytest.mark.parametrize(
    "problem", [LINEARS[0], LINEARS[1], GATED[0], RMS_NORM, ADD_RMS_NORM], ids=lambda p: p.name
)


def raw(problem):
    return getattr(torch.ops.tpmp_kernels, problem.op).default


@each_problem
@pytest.mark.parametrize("requires_grad", [pytest.param(False, marks=pytest.mark.full), True])
def test_opcheck(problem, requires_grad):
    inputs = problem.inputs(torch.float32, requires_grad=requires_grad)
    torch.library.opcheck(raw(problem), problem.raw(*inputs))


@a_few
@pytest.mark.parametrize("dtype", [pytest.param(torch.float64, marks=pytest.mark.full), torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [pytest.param("transposed", marks=pytest.mark.full), "strided"])
def test_opcheck_dtypes_and_layouts(problem, dtype, layout):
    inputs = problem.inputs(dtype, layout=layout, requires_grad=True)
    torch.library.opcheck(raw(problem), problem.raw(*inputs))


@pytest.mark.parametrize("inner", INNER, ids=lambda i: i.name)
def test_opcheck_inner_ops(inner):
    torch.library.opcheck(raw(inner), inner.arguments())


def registered() -> set[str]:
    names = torch._C._dispatch_get_all_op_names()
    return {name.split("::")[1] for name in names if name.startswith("tpmp_kernels::")}


# Ops that opcheck cannot call, each with the test that stands in for it.
UNCHECKED = {
    "add_to_main_grad": "test_losses.py: it finds its parameter by an address",
    "linear_cross_entropy_backward_of_parameter": "test_losses.py: the same",
    "wgrad_of_parameter": "test_main_grad.py: it finds its parameter by an address",
}


def test_every_registered_op_is_checked_here():
    missing = registered() - {each.op for each in [*PROBLEMS, *INNER]} - UNCHECKED.keys()
    assert not missing, f"in neither PROBLEMS nor INNER: {sorted(missing)}"


# Autocast's rule for each op that people call. `lowest` is that of F.linear; a norm keeps the widest dtype it is given.
NARROWED = {"linear", "gated_linear", "mlp", "gated_mlp", "dgrad", "wgrad", "linear_cross_entropy"}


@each_problem
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_autocast(problem, low, seed):
    """Inputs of mixed dtypes (all fp32 at seed 0) give the bits of inputs cast by hand, and gradients in their own."""
    rng = random.Random(seed)
    inputs = [
        t.to(rng.choice([torch.float32, low]) if seed else t.dtype).requires_grad_() if t.is_floating_point() else t
        for t in problem.inputs(torch.float32)
    ]
    floating = [t for t in inputs if t.is_floating_point()]
    with torch.autocast("cpu", dtype=low):
        results = flat(problem.call(ops, *inputs))
        dtype = AUTOCAST[raw(problem)]("cpu", floating)
    assert dtype == (low if problem.op in NARROWED else torch.float32 if not seed else dtype)
    by_hand = flat(problem.call(ops, *(t.to(dtype) if t.is_floating_point() else t for t in inputs)))
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(results, by_hand, strict=True))
    grads = torch.autograd.grad(sum(t.sum() for t in results), floating)
    assert all(g.dtype == t.dtype and g.isfinite().all() for g, t in zip(grads, floating, strict=True))


@each_problem
def test_autocast_leaves_fp64_alone_and_does_not_mix_it(problem):
    inputs = problem.inputs(torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = flat(problem.call(ops, *inputs))
        if sum(t.is_floating_point() for t in inputs) > 1:
            with pytest.raises(TypeError, match=r"torch\.float64"):
                problem.call(ops, inputs[0].float(), *inputs[1:])
    assert all(torch.equal(a, b) for a, b in zip(results, flat(problem.call(ops, *inputs)), strict=True))


def test_every_op_has_an_autocast_rule_or_is_below_it():
    """Inner ops run below autocast. wgrad_into casts what it reads, as a rule of the op would cast what it writes."""
    public = {p.op for p in PROBLEMS}
    assert {op.name().split("::")[1] for op in AUTOCAST} >= public - {"wgrad_into"}


@each_problem
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_inputs_are_only_read_and_outputs_are_new(problem, dtype, requires_grad):
    """No input or saved tensor changes, no output shares memory with an input, and outputs are contiguous."""
    inputs = problem.inputs(dtype, layout="transposed", requires_grad=requires_grad)
    before = [t.detach().clone() for t in inputs]
    outputs = flat(problem.call(ops, *inputs))
    if requires_grad:
        torch.autograd.grad(outputs, inputs, [torch.ones_like(t) for t in outputs])
    assert all(torch.equal(t, b) for t, b in zip(inputs, before, strict=True))
    storages = {t.untyped_storage().data_ptr() for t in inputs}
    assert all(t.is_contiguous() and t.untyped_storage().data_ptr() not in storages for t in outputs)


@each_problem
def test_results_can_be_changed_in_place(problem):
    """As those of torch can: autograd refuses that for a Function's result that is a view."""
    for result in flat(problem.call(ops, *problem.inputs(torch.float32, requires_grad=True))):
        result.add_(1)


def test_only_the_gradients_asked_for_are_computed(monkeypatch):
    products = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: products.append(a.shape) or mm(a, b))
    x, w, b, r = LINEARS[1].inputs(torch.float64)
    for wanted, expected in ((x, 1), (w, 1), (b, 0), (r, 0)):
        products.clear()
        wanted.requires_grad_()
        y = ops.linear(x, w, b, activation="gelu", residual=r)
        products.clear()
        y.sum().backward()
        wanted.requires_grad_(False)
        assert len(products) == expected


def test_reference_backend_is_the_reference():
    x, w, b, r = LINEARS[1].inputs(torch.float32, requires_grad=True)
    with ops.use_backend("reference"):
        y = ops.linear(x, w, b, activation="gelu", residual=r)
    assert torch.equal(y, reference.linear(x, w, b, activation="gelu", residual=r))
    assert "Add" in type(y.grad_fn).__name__
