"""ops.mlp and ops.gated_mlp: the composition of their linears, gradients asked for, shapes, and what they refuse."""

import random

import pytest
import torch
from bounds import assert_no_worse_than_torch
from linear_problems import MLPS

from tpmp_kernels import ops, reference

SIZES = (0, 1, 2, 3, 7, 16, 31, 64, 97)


def draw(dtype, *shapes):
    return [torch.randn(s, dtype=torch.float64).to(dtype).div(max(s[-1], 1) ** 0.5).requires_grad_() for s in shapes]


def problem(rng, dtype, gated):
    """A random call of one of the two, its inputs, in random layouts."""
    m, k, f, n = (rng.choice(SIZES) for _ in range(4))
    shapes = [(m, k), (f, k), *([(f, k)] if gated else []), (n, f)]
    bias = not gated and rng.random() < 0.6
    inputs = draw(dtype, *shapes, *([(f,), (n,)] if bias else []))
    if rng.random() < 0.5:
        inputs = [t.detach().t().contiguous().t().requires_grad_() if t.dim() == 2 else t for t in inputs]
    name, save = rng.choice(reference.GATES if gated else list(reference.ACTIVATIONS)), rng.random() < 0.5
    op = "gated_mlp" if gated else "mlp"
    return lambda room, *t: getattr(room, op)(*t, activation=name, save_preact=save), inputs


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(s, marks=pytest.mark.full) for s in range(3, 60))])
def test_random_problems_are_no_worse_than_the_composition(dtype, gated, seed):
    rng = random.Random(f"{dtype}{gated}{seed}")
    torch.manual_seed(seed)
    call, inputs = problem(rng, dtype, gated)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    results = []
    for room, tensors in ((ops, inputs), (reference, inputs), (reference, wide)):
        y = call(room, *tensors)
        torch.manual_seed(seed)
        upstream = torch.randn(y.shape, dtype=torch.float64).to(dtype).to(y.dtype)
        results.append([y.detach(), *torch.autograd.grad(y, tensors, upstream)])
    unit = 2.0**-49 if dtype is torch.float64 else None  # there the oracle rounds as often as what it judges
    for ours, theirs, exact in zip(*results, strict=True):
        assert ours.dtype == dtype and ours.shape == exact.shape
        assert_no_worse_than_torch(ours, theirs, exact, unit)


@pytest.mark.parametrize("mlp", MLPS, ids=lambda p: p.name)
def test_the_reference_is_the_composition_of_ops_in_fp64(mlp):
    """The op itself equals its two linears, taken as ops, to the bit."""
    x, *weights = mlp.inputs(torch.float64)
    y = mlp.call(ops, x, *weights)
    activation = mlp.name.split("-")[1]
    if mlp.op == "gated_mlp":
        gate, up, down = weights
        composed = ops.linear(ops.gated_linear(x, gate, up, activation=activation), down)
    else:
        up, down, *biases = weights
        b_up, b_down = biases or (None, None)
        composed = ops.linear(ops.linear(x, up, b_up, activation=activation), down, b_down)
    assert torch.equal(y, composed)


@pytest.mark.parametrize("mlp", MLPS, ids=lambda p: p.name)
def test_only_the_gradients_asked_for_are_computed(mlp, monkeypatch):
    """GEMMs of the backward, without those that make pre-activations again: one each for h, dx and every weight."""
    products = []
    for name in ("mm", "addmm"):
        original = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, f=original: products.append(1) or f(*a))
    names = ["x", *(["gate"] if mlp.op == "gated_mlp" else []), "up", "down", "b_up", "b_down"]
    # dy @ w_down, then x's own (that of a gated mlp adds a second one in place), or the weight's.
    expected = {"x": 2, "gate": 2, "up": 2, "down": 1, "b_up": 1, "b_down": 0}
    inputs = mlp.inputs(torch.float64)
    truth = [t.detach().requires_grad_() for t in inputs]
    truth = torch.autograd.grad(mlp.call(reference, *truth).square().sum(), truth)
    again = (2 if mlp.op == "gated_mlp" else 1) * mlp.name.endswith("again")
    for position, tensor in enumerate(inputs):
        wanted = tensor.detach().requires_grad_()
        y = mlp.call(ops, *inputs[:position], wanted, *inputs[position + 1 :])
        products.clear()
        y.square().sum().backward()
        name = names[position]
        assert len(products) == expected[name] + again * (name != "b_down"), name
        torch.testing.assert_close(wanted.grad, truth[position], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(7,), (0, 7), (2, 0, 7), (1, 7), (2, 3, 4, 7)])
@pytest.mark.parametrize("save_preact", [True, False])
def test_any_leading_shape(shape, save_preact):
    torch.manual_seed(1)
    x, up, down = torch.randn(shape, requires_grad=True), torch.randn(5, 7), torch.randn(6, 5)
    for call in (
        lambda room: room.mlp(x, up, down, save_preact=save_preact),
        lambda room: room.gated_mlp(x, up, up, down, save_preact=save_preact),
    ):
        y, expected = call(ops), call(reference)
        torch.testing.assert_close(y, expected)
        upstream = torch.randn_like(expected)
        torch.testing.assert_close(torch.autograd.grad(y, x, upstream), torch.autograd.grad(expected, x, upstream))


@pytest.mark.parametrize("mlp", [MLPS[0], MLPS[3]], ids=lambda p: p.name)
def test_autocast_casts_like_a_linear(mlp):
    inputs = mlp.inputs(torch.float32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mlp.call(ops, *inputs)
    assert y.dtype == torch.bfloat16 and torch.equal(y, mlp.call(ops, *(t.bfloat16() for t in inputs)))
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.sum(), inputs))


X, W, D = torch.zeros(2, 64), torch.zeros(3, 64), torch.zeros(5, 3)
REFUSED = [
    (lambda: ops.mlp(X, torch.zeros(3, 65), D), ValueError, "pass a w_up of shape [N, 64]"),
    (lambda: ops.mlp(X, W, torch.zeros(5, 4)), ValueError, "w_down must have shape [N, 3] to follow w_up, got [5, 4]"),
    (lambda: ops.mlp(X, W, D, torch.zeros(4)), ValueError, "b_up must have shape [3], got [4]"),
    (lambda: ops.mlp(X, W, D, None, torch.zeros(4)), ValueError, "b_down must have shape [5], got [4]"),
    (lambda: ops.mlp(X, W, D, activation=None), ValueError, "expected one of gelu, gelu_tanh, silu, relu, relu2"),
    (lambda: ops.mlp(X, W, D.double()), TypeError, "w_down has dtype torch.float64 but x has torch.float32"),
    (lambda: ops.gated_mlp(X, W, torch.zeros(4, 64), D), ValueError, "w_up must have shape [3, 64], got [4, 64]"),
    (lambda: ops.gated_mlp(X, W, W, torch.zeros(5, 4)), ValueError, "w_down must have shape [N, 3] to follow w_up"),
    (lambda: ops.gated_mlp(X, W, W, D, activation="relu"), ValueError, "expected one of silu, gelu, gelu_tanh"),
]


@pytest.mark.parametrize(("call", "kind", "text"), REFUSED, ids=[text for _, _, text in REFUSED])
def test_refused_in_one_sentence(call, kind, text):
    with pytest.raises(kind) as error:
        call()
    assert text in str(error.value) and "\n" not in str(error.value)
