"""The CPU ops against the fp64 oracle, their gradients, exact integers, odd shapes, and what they refuse."""

import random

import pytest
import torch
from bounds import UNIT, assert_no_worse_than_torch, assert_within, linear_bound
from case import Case, check
from problems import GATED, LINEARS, PROBLEMS

from tpmp_kernels import ops, reference

ACTIVATIONS = (None, *reference.ACTIVATIONS)
SIZES = (0, 1, 2, 3, 7, 16, 31, 64, 97, 130)


def draw(shape, dtype, layout="contiguous"):
    t = torch.randn(shape, dtype=torch.float64).to(dtype)
    return t if layout == "contiguous" else t.transpose(0, -1).contiguous().transpose(0, -1)


@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.full) for s in range(1, 50))])
def test_linear_is_within_its_bound(dtype, activation, seed):
    rng = random.Random(f"{dtype}{activation}{seed}")
    torch.manual_seed(seed)
    m, n, k = (rng.choice(SIZES) for _ in range(3))
    layout = rng.choice(["contiguous", "transposed"])
    x, weight = draw((m, k), dtype, layout), draw((n, k), dtype, layout)
    bias = draw((n,), dtype) if rng.random() < 0.6 else None
    residual = draw((m, n), dtype, layout) if rng.random() < 0.6 else None
    oracle, bound = linear_bound(x, weight, bias, activation=activation, residual=residual, unfused=True)
    eager = reference.linear(x, weight, bias, activation=activation, residual=residual)
    for saved in (False, True):  # the fused form, and the one that keeps the pre-activation
        y = ops.linear(x, weight.detach().requires_grad_(saved), bias, activation=activation, residual=residual)
        assert y.dtype == dtype
        assert_within(y.detach(), oracle, bound)
        assert_no_worse_than_torch(y.detach(), eager, oracle)


@pytest.mark.parametrize("dtype", UNIT, ids=str)
def test_integers_are_exact(dtype):
    x, w = torch.randint(-1, 2, (37, 64)).to(dtype), torch.randint(-1, 2, (53, 64)).to(dtype)
    b, r = torch.randint(-3, 4, (53,)).to(dtype), torch.randint(-3, 4, (37, 53)).to(dtype)
    z = x.double() @ w.double().t() + b.double()
    for saved in (False, True):
        w.requires_grad_(saved)
        assert torch.equal(ops.linear(x, w, b, residual=r).double(), z + r.double())
        assert torch.equal(ops.linear(x, w, b, activation="relu", residual=r).double(), z.relu() + r.double())
        # An epilogue that is exact in every dtype: z of at most 67 squares to less than 2^13.
        assert torch.equal(ops.linear(x, w, b, activation="relu2"), z.relu().square().to(dtype))


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_gradients_in_fp64(problem):
    """gradcheck: analytic against numeric. A rectifier's corner is not met by random inputs."""
    inputs = problem.inputs(torch.float64, layout="transposed", requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: problem.call(ops, *t), inputs)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_gradients_in_fp32_follow_the_reference(problem, layout):
    check(Case(problem.inputs(torch.float32, layout=layout), problem.call))


@pytest.mark.parametrize("problem", [LINEARS[1], *GATED], ids=lambda p: p.name)
def test_fused_and_saved_forms_agree_in_fp64_to_the_bit(problem):
    """fp64 carries a proof: the same arithmetic with and without gradients, and the reference's."""
    with_grad = problem.call(ops, *problem.inputs(torch.float64, requires_grad=True))
    without = problem.call(ops, *problem.inputs(torch.float64))
    assert torch.equal(with_grad, without)
    assert torch.equal(with_grad, problem.call(reference, *problem.inputs(torch.float64)))


@pytest.mark.parametrize("shape", [(7,), (0, 7), (2, 0, 7), (1, 7), (2, 3, 4, 7)])
def test_any_leading_shape(shape):
    torch.manual_seed(1)
    x, w, norm = torch.randn(shape, requires_grad=True), torch.randn(5, 7), torch.randn(7)
    for call in (
        lambda room: room.linear(x, w, activation="silu"),
        lambda room: room.gated_linear(x, w, w),
        lambda room: room.rms_norm(x, norm),
    ):
        y, expected = call(ops), call(reference)
        torch.testing.assert_close(y, expected)
        upstream = torch.randn_like(expected)
        torch.testing.assert_close(torch.autograd.grad(y, x, upstream), torch.autograd.grad(expected, x, upstream))


def test_rms_norm_statistics_are_wide():
    """Squares of 300 overflow fp16 and squares of 1e-4 vanish in it: the statistics must not be taken there."""
    for scale in (300.0, 1e-4):
        x = torch.full((4, 512), scale, dtype=torch.float16)
        y = ops.rms_norm(x, torch.ones(512, dtype=torch.float16), eps=1e-20)
        torch.testing.assert_close(y, torch.ones_like(y))


X, W, B = torch.zeros(2, 64), torch.zeros(3, 64), torch.zeros(3)
REFUSED = [
    (lambda: ops.linear(X, torch.zeros(3, 65)), ValueError, "pass a weight of shape [N, 64]"),
    (lambda: ops.linear(torch.tensor(1.0), W), ValueError, "x has shape []"),
    (lambda: ops.linear(X, W, torch.zeros(4)), ValueError, "bias must have shape [3], got [4]"),
    (lambda: ops.linear(X, W, residual=torch.zeros(2, 4)), ValueError, "residual must have shape [2, 3], got [2, 4]"),
    (
        lambda: ops.linear(X, W, activation="tanh"),
        ValueError,
        "expected one of None, gelu, gelu_tanh, silu, relu, relu2",
    ),
    (lambda: ops.linear(X, W.double()), TypeError, "weight has dtype torch.float64 but x has torch.float32"),
    (lambda: ops.linear(X.long(), W.long()), TypeError, "x must be fp64, fp32, fp16 or bf16, got torch.int64"),
    (lambda: ops.linear(X, W.to("meta")), ValueError, "weight is on meta but x is on cpu"),
    (lambda: ops.gated_linear(X, W, torch.zeros(4, 64)), ValueError, "w_up must have shape [3, 64], got [4, 64]"),
    (lambda: ops.gated_linear(X, W, W, activation="relu"), ValueError, "expected one of silu, gelu, gelu_tanh"),
    (lambda: ops.rms_norm(X, torch.zeros(63)), ValueError, "weight must have shape [64], got [63]"),
    (lambda: ops.rms_norm(X, X[0], residual=W), ValueError, "residual must have shape [2, 64], got [3, 64]"),
    (lambda: ops.use_backend("cuda").__enter__(), ValueError, "expected one of triton, cpu, reference"),
]


@pytest.mark.parametrize(("call", "kind", "text"), REFUSED, ids=[text for _, _, text in REFUSED])
def test_refused_in_one_sentence(call, kind, text):
    with pytest.raises(kind) as error:
        call()
    assert text in str(error.value) and "\n" not in str(error.value)


def test_triton_on_a_cpu_tensor_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with ops.use_backend("triton"), pytest.raises(ValueError, match="needs CUDA tensors, got cpu"):
        ops.linear(X, W)


def test_the_environment_chooses_and_the_context_overrides_it(monkeypatch):
    monkeypatch.setenv("TPMP_OPS", "reference")
    w = W.clone().requires_grad_()
    assert "_Linear" not in type(ops.linear(X, w).grad_fn).__name__
    with ops.use_backend("cpu"):
        assert "_Linear" in type(ops.linear(X, w).grad_fn).__name__
    monkeypatch.setenv("TPMP_OPS", "fast")
    with pytest.raises(ValueError, match="TPMP_OPS: expected one of triton, cpu, reference, got 'fast'"):
        ops.linear(X, W)


def test_ops_load_without_triton():
    import subprocess
    import sys

    program = "import sys; sys.modules['triton'] = None; import tpmp_kernels.ops, tpmp_kernels.kernels.tiles, torch;"
    program += "x = torch.ones(2, 2); assert tpmp_kernels.ops.linear(x, x, activation='silu').shape == (2, 2)"
    subprocess.run([sys.executable, "-c", program], check=True)
