"""bf16 products on a CPU that multiplies fp32 faster: operands are widened, and results are as good and better."""

import pytest
import torch

from tpmp_kernels import ops
from tpmp_kernels.bench.compare import measure
from tpmp_kernels.bench.compare.problems import problem
from tpmp_kernels.ops import plain
from tpmp_kernels.reference import ACTIVATIONS, GATES

SHAPE = (96, 160, 128)


@pytest.fixture(params=[True, False], ids=["fast", "slow"])
def fast(request, monkeypatch):
    monkeypatch.setattr(plain, "fast_bf16", lambda: request.param)
    return request.param


@pytest.fixture
def products(monkeypatch):
    """The dtype of every torch.mm."""
    seen, mm = [], torch.mm

    def record(a, b, **out):
        seen.append(a.dtype)
        return mm(a, b, **out)

    monkeypatch.setattr(torch, "mm", record)
    return seen


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize(
    ("op", "activation"), [("linear", "relu2"), ("gated_linear", "silu"), ("mlp", "gelu"), ("gated_mlp", "gelu_tanh")]
)
def test_every_product_is_widened_where_bf16_is_slow(op, activation, backward, fast, products):
    asked = problem(op, SHAPE, activation)
    (ours,) = (call for name, call in measure.contenders(asked, "cpu").items() if name == "tpmp cpu")
    measure.step(ours, backward=backward)(*asked.draw(torch.bfloat16, "cpu", 0))
    assert products or fast  # else oneDNN's fused linears, which are not torch.mm
    assert set(products) <= {torch.bfloat16 if fast else torch.float32}


@pytest.mark.parametrize(
    ("op", "activation"),
    [(op, name) for op in ("linear", "mlp") for name in ACTIVATIONS]
    + [(op, name) for op in ("gated_linear", "gated_mlp") for name in GATES],
)
def test_errors_are_at_most_twice_those_of_torch(op, activation, fast):
    asked = problem(op, SHAPE, activation)
    operands = asked.draw(torch.bfloat16, "cpu", 1)
    calls = {name: measure.contenders(asked, "cpu")[name] for name in ("eager", "tpmp cpu")}
    assert not measure.errors(asked, calls, operands, backward=True)["tpmp cpu"].wrong


def test_a_residual_is_added_before_the_one_rounding(monkeypatch):
    monkeypatch.setattr(plain, "fast_bf16", lambda: False)
    x, w, b, residual = (torch.randn(shape).bfloat16() for shape in ((96, 128), (160, 128), (160,), (96, 160)))
    exact = torch.relu(x.double() @ w.double().t() + b.double()) + residual.double()
    y = ops.linear(x, w, b, activation="relu", residual=residual)
    torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(torch.bfloat16).eps / 2, atol=1e-4)


def test_main_grad_takes_the_unrounded_product(monkeypatch):
    monkeypatch.setattr(plain, "fast_bf16", lambda: False)
    dz, x = torch.randn(96, 160).bfloat16(), torch.randn(96, 128).bfloat16()
    main_grad = torch.zeros(160, 128)
    ops.wgrad(dz, x, main_grad=main_grad)
    torch.testing.assert_close(main_grad.double(), dz.double().t() @ x.double(), rtol=1e-5, atol=1e-4)


def test_little_reuse_is_not_worth_widening(monkeypatch):
    monkeypatch.setattr(plain, "fast_bf16", lambda: False)
    weight = torch.empty(1024, 4096, dtype=torch.bfloat16)
    assert not plain.widens(torch.empty(8, 1024, dtype=torch.bfloat16), weight)
    assert plain.widens(torch.empty(512, 1024, dtype=torch.bfloat16), weight)
    assert not plain.widens(torch.empty(512, 1024, dtype=torch.float16), weight.half())
