"""The linear family on a CUDA device: fp32 results, main_grad, pre-activations made again, B and W apart."""

import pytest
import torch
from bounds import UNIT, assert_within, linear_bound

from tpmp_kernels import ops, reference

pytestmark = pytest.mark.gpu
HALF = [torch.bfloat16, torch.float16]
LOW = [torch.bfloat16, torch.float16, torch.float32]


def draw(*shape, dtype):
    return torch.randn(*shape, device="cuda").to(dtype).requires_grad_()


def integers(*shape, dtype):
    return torch.randint(-1, 2, shape, device="cuda").to(dtype)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", [(67, 131, 257), (2048, 1536, 1024)], ids=str)
def test_cuda_out_dtype_is_the_accumulator(dtype, shape):
    torch.manual_seed(0)
    m, n, k = shape
    x, w, b, r = draw(m, k, dtype=dtype), draw(n, k, dtype=dtype), draw(n, dtype=dtype), draw(m, n, dtype=torch.float32)
    y = ops.linear(x, w, b, activation="gelu", residual=r, out_dtype=torch.float32).detach()
    wide = [t.detach().float() for t in (x, w, b)]
    assert_within(y, *linear_bound(*wide, activation="gelu", residual=r.detach(), unit=UNIT[torch.float32]))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("form", ["eager", "aot_eager", "inductor"])
def test_cuda_main_grad_of_integers_is_exact(dtype, form):
    """Two microbatches, zero_grad, two again, through both weights of an mlp: every bit, and from zero again."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    up, down = (torch.nn.Parameter(integers(*s, dtype=dtype)) for s in ((200, 136), (136, 200)))
    exact = [p.detach().double().requires_grad_() for p in (up, down)]
    ops.attach_main_grad([up, down])
    x, upstream = integers(70, 136, dtype=dtype), integers(70, 136, dtype=dtype)
    run = lambda x, up, down: ops.mlp(x, up, down, activation="relu")  # noqa: E731
    run = run if form == "eager" else torch.compile(run, fullgraph=True, backend=form)
    for _ in range(2):
        for parameter in (up, down, *exact):
            parameter.grad = None
        for _ in range(2):
            run(x, up, down).backward(upstream)
            reference.mlp(x.double(), *exact, activation="relu").backward(upstream.double())
        for ours, truth in zip((up, down), exact, strict=True):
            assert torch.equal(ours.main_grad.double(), truth.grad)
            if dtype is torch.float32:
                assert ours.grad is ours.main_grad
            else:
                ours.main_grad.zero_()


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_cuda_preactivations_made_again_are_the_same_bits(dtype):
    torch.manual_seed(0)
    x, up, gate, down = (draw(*s, dtype=dtype) for s in ((300, 1024), (1536, 1024), (1536, 1024), (1024, 1536)))
    forms = [
        (lambda s: ops.linear(x, up, activation="gelu", save_preact=s), [x, up]),
        (lambda s: ops.gated_linear(x, gate, up, save_preact=s), [x, gate, up]),
        (lambda s: ops.mlp(x, up, down, save_preact=s), [x, up, down]),
        (lambda s: ops.gated_mlp(x, gate, up, down, save_preact=s), [x, gate, up, down]),
    ]
    for call, inputs in forms:
        saved, again = call(True), call(False)
        upstream = torch.randn_like(saved)
        pairs = zip(*(torch.autograd.grad(y, inputs, upstream) for y in (saved, again)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_cuda_split_has_the_bits_of_the_whole(dtype):
    torch.manual_seed(0)
    x, w = draw(300, 1024, dtype=dtype), draw(1536, 1024, dtype=dtype)
    upstream = torch.randn(300, 1536, device="cuda").to(dtype)
    dx, dw = torch.autograd.grad(ops.linear(x, w, activation="gelu"), [x, w], upstream)
    tap = ops.tap(x, w)
    dx_apart, dz = torch.autograd.grad(ops.linear(x, w, activation="gelu", tap=tap), [x, tap], upstream)
    assert torch.equal(dx_apart, dx) and torch.equal(ops.wgrad(dz, x), dw)
