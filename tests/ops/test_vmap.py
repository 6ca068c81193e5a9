"""What torch.func and autograd may do with an op: one gradient in reverse mode; the rest is refused, never wrong."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from problems import INNER, LINEARS, PROBLEMS, flat

from tpmp_kernels import ops, reference

each_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)


def total(problem, room):
    """A scalar of the problem's inputs, not linear in its results."""
    return lambda *tensors: sum(t.square().sum() for t in flat(problem.call(room, *tensors)))


def differentiable(tensors) -> tuple[int, ...]:
    return tuple(i for i, t in enumerate(tensors) if t.is_floating_point())


def refused(problem, what: str):
    """One sentence, whose first word is the op, or the inner op of the same family that met the transform."""
    return pytest.raises(NotImplementedError, match=rf"(?s)\A{problem.op}\w*: expected [^\n]*{what}[^\n]*\Z")


def stacked(problem) -> list[torch.Tensor]:
    return [torch.stack([t, t]) for t in problem.inputs(torch.float64)]


@each_problem
def test_vmap_is_refused(problem):
    with refused(problem, "torch.func.vmap"):
        torch.func.vmap(lambda *t: problem.call(ops, *t))(*stacked(problem))


@each_problem
def test_vmap_of_a_gradient_is_refused(problem):
    inputs = stacked(problem)
    with refused(problem, "torch.func.vmap"):
        torch.func.vmap(torch.func.grad(total(problem, ops), differentiable(inputs)))(*inputs)


def test_vmap_runs_on_the_reference_backend():
    x, w = torch.randn(3, 2, 7), torch.randn(5, 7)
    with ops.use_backend("reference"):
        got = torch.func.vmap(ops.linear, in_dims=(0, None))(x, w)
    torch.testing.assert_close(got, x @ w.t())


@each_problem
def test_func_grad_is_autograd(problem):
    inputs = problem.inputs(torch.float64, requires_grad=True)
    wanted = differentiable(inputs)
    expected = torch.autograd.grad(total(problem, ops)(*inputs), [inputs[i] for i in wanted])
    got = torch.func.grad(total(problem, ops), wanted)(*(t.detach() for t in inputs))
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


def test_func_grad_lets_an_outer_gradient_through():
    """The outputs of torch.func.vjp keep their graph: a first derivative by a weight outside is right."""
    x, w = torch.randn(3, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    y, _ = torch.func.vjp(lambda x: ops.linear(x, w), x)
    expected = torch.autograd.grad(ops.linear(x, w).square().sum(), w)
    assert torch.equal(torch.autograd.grad(y.square().sum(), w)[0], expected[0])


@each_problem
def test_forward_mode_is_refused(problem):
    inputs = problem.inputs(torch.float64)
    wanted = [inputs[i] for i in differentiable(inputs)]

    def call(*changed):
        left = iter(changed)
        return flat(problem.call(ops, *(next(left) if t.is_floating_point() else t for t in inputs)))

    with refused(problem, "forward-mode"):
        torch.func.jvp(call, tuple(wanted), tuple(map(torch.ones_like, wanted)))
    with refused(problem, "forward-mode"), forward_ad.dual_level():
        call(*(forward_ad.make_dual(t, torch.ones_like(t)) for t in wanted))
    with forward_ad.dual_level():
        call(*wanted)  # no tangent, no refusal


@each_problem
@pytest.mark.parametrize("frozen", [False, True])
def test_second_derivatives_are_refused(problem, frozen):
    """Also of a loss linear in y, whose upstream gradient has no grad: torch's once_differentiable lets that pass."""
    inputs = problem.inputs(torch.float64, requires_grad=True)
    wanted = [t for t in inputs if t.requires_grad]
    for t in wanted[1:] if frozen else ():
        t.requires_grad_(False)
    wanted = [t for t in wanted if t.requires_grad]
    for linear in (True, False):
        loss = sum((t if linear else t.square()).sum() for t in flat(problem.call(ops, *inputs)))
        grads = torch.autograd.grad(loss, wanted, create_graph=True)
        with refused(problem, "differentiated once"):
            (loss + sum(g.square().sum() for g in grads)).backward()


@each_problem
def test_second_derivatives_of_func_are_right_or_refused(problem):
    inputs = problem.inputs(torch.float64)

    def second(room):
        inner = torch.func.grad(total(problem, room), differentiable(inputs))
        return torch.func.grad(lambda *t: sum(g.square().sum() for g in inner(*t)), differentiable(inputs))(*inputs)

    try:
        got = second(ops)
    except NotImplementedError as error:
        assert "expected to be differentiated once" in str(error)
    else:
        torch.testing.assert_close(got, second(reference))


@pytest.mark.parametrize("problem", [LINEARS[0], LINEARS[1]], ids=lambda p: p.name)
def test_forward_mode_over_reverse_is_refused(problem):
    inputs = problem.inputs(torch.float64)
    gradient = torch.func.grad(total(problem, ops))
    with refused(problem, "forward-mode"):
        torch.func.jvp(lambda x: gradient(x, *inputs[1:]), (inputs[0],), (torch.ones_like(inputs[0]),))


@pytest.mark.parametrize("inner", INNER, ids=lambda i: i.name)
def test_inner_ops_refuse_to_be_differentiated(inner):
    arguments = [a.requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a for a in inner.arguments()]
    results = [t for t in flat(getattr(torch.ops.tpmp_kernels, inner.op)(*arguments)) if t is not None]
    if results:
        with refused(inner, "differentiated once"):
            sum(t.sum() for t in results).backward()
