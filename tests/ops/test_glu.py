"""ops.glu on the CPU against its bounds and torch, on halves of one product, and what it refuses."""

import pytest
import torch
from bounds import UNIT, assert_no_worse_than_torch, assert_within
from neighbour_bounds import glu_bounds

from tpmp_kernels import ops, reference

each_gate = pytest.mark.parametrize("activation", reference.GATES)


def both_ways(room, gate, up, dy, activation) -> list[torch.Tensor]:
    y = room.glu(gate, up, activation=activation)
    return [y.detach(), *torch.autograd.grad(y, [gate, up], dy)]


@pytest.mark.parametrize("dtype", UNIT, ids=str)
@each_gate
@pytest.mark.parametrize("shape", [(40, 67), (0, 5), (5, 0), (1,), (2, 3, 1, 7)], ids=str)
def test_glu_and_its_gradients(dtype, activation, shape):
    """Half precision is rounded where torch rounds it, and torch's derivative of gelu_tanh loses digits in 1 - tanh: so
    within the bound of one rounding is y, in fp32 and wider."""
    torch.manual_seed(0)
    gate, up, dy = (torch.randn(shape, dtype=torch.float64).mul(3).to(dtype) for _ in range(3))
    bounds = glu_bounds(dy, gate, up, activation)
    gate.requires_grad_(), up.requires_grad_()
    got, eager = (both_ways(room, gate, up, dy, activation) for room in (ops, reference))
    for ours, theirs, (oracle, _) in zip(got, eager, bounds, strict=True):
        assert ours.dtype == dtype
        assert_no_worse_than_torch(ours, theirs, oracle, least=100)
    if dtype in (torch.float32, torch.float64):
        assert_within(got[0], *bounds[0])


@each_gate
def test_fp64_is_the_reference_to_the_bit(activation):
    gate, up, dy = (torch.randn(5, 7, dtype=torch.float64, requires_grad=i < 2) for i in range(3))
    got, expected = (both_ways(room, gate, up, dy, activation) for room in (ops, reference))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_halves_of_one_product_and_gate_and_up_alone_are_kept():
    kept, product = [], torch.randn(3, 4, 14, requires_grad=True)
    gate, up = product.chunk(2, dim=-1)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        y = ops.glu(gate, up)
    assert kept == [gate.data_ptr(), up.data_ptr()] and y.is_contiguous()
    assert torch.equal(y, ops.glu(gate.contiguous(), up.contiguous()))
    got = torch.autograd.grad(y.sum(), product)[0]
    torch.testing.assert_close(got, torch.autograd.grad(reference.glu(gate, up).sum(), product)[0])


X = torch.zeros(2, 64)
REFUSED = [
    (lambda: ops.glu(X, X[:, :1]), ValueError, "glu: up must have shape [2, 64], got [2, 1]"),
    (lambda: ops.glu(X, X.double()), TypeError, "glu: up has dtype torch.float64 but gate has torch.float32"),
    (lambda: ops.glu(X[0, 0], X[0, 0]), ValueError, "glu: gate must have at least one dimension, got a scalar"),
    (
        lambda: ops.glu(X, X, activation="relu"),
        ValueError,
        "glu: unknown activation 'relu'; expected one of silu",
    ),
]


@pytest.mark.parametrize(("call", "kind", "text"), REFUSED)
def test_refused_in_one_sentence(call, kind, text):
    with pytest.raises(kind) as error:
        call()
    assert str(error.value).startswith(text) and "\n" not in str(error.value)
