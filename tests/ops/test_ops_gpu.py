"""ops.linear and its neighbours on a CUDA device: numbers, gradients, compile. Imports torch and pytest alone."""

import pytest
import torch
from bounds import UNIT, assert_no_worse_than_torch, assert_within, linear_bound
from problems import PROBLEMS, flat

from tpmp_kernels import ops, reference

pytestmark = pytest.mark.gpu
SHAPES = [(1, 1, 1), (0, 5, 3), (67, 131, 257), (130, 300, 4096), (1, 4096, 1000), (2048, 1536, 1024)]


def draw(*shape, dtype):
    return torch.randn(*shape, device="cuda").to(dtype)


@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize("activation", [None, *reference.ACTIVATIONS])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cuda_linear_is_within_its_bound(dtype, activation, shape):
    torch.manual_seed(0)
    m, n, k = shape
    x, w, b, r = draw(k, m, dtype=dtype).t(), draw(n, k, dtype=dtype), draw(n, dtype=dtype), draw(m, n, dtype=dtype)
    oracle, bound = linear_bound(x, w, b, activation=activation, residual=r, unfused=dtype is torch.float64)
    eager = reference.linear(x, w, b, activation=activation, residual=r)
    for saved in (False, True):
        y = ops.linear(x, w.requires_grad_(saved), b, activation=activation, residual=r).detach()
        assert_within(y, oracle, bound)
        assert_no_worse_than_torch(y, eager, oracle)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_gradients_follow_the_reference(problem, dtype):
    inputs = [t.detach().cuda().requires_grad_() for t in problem.inputs(dtype)]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    got, eager, oracle = (flat(problem.call(*a)) for a in ((ops, *inputs), (reference, *inputs), (reference, *wide)))
    upstream = [torch.randn_like(t) for t in got]
    grads, eager_grads = (torch.autograd.grad(y, inputs, upstream) for y in (got, eager))
    truth = torch.autograd.grad(oracle, wide, [u.double() for u in upstream])
    for ours, theirs, exact in zip([*got, *grads], [*eager, *eager_grads], [*oracle, *truth], strict=True):
        assert_no_worse_than_torch(ours.detach(), theirs.detach(), exact.detach(), least=1)


def test_cuda_offsets_past_two_to_the_31():
    """Y has 2^31 + 2^16 elements: its last row is right only with 64-bit offsets."""
    m, n = 2**15 + 1, 2**16
    if torch.cuda.mem_get_info()[0] < 3 * m * n * 2:
        pytest.skip("needs 13 GB of free GPU memory")
    x, w = torch.randn(m, 16, device="cuda").bfloat16(), torch.randn(n, 16, device="cuda").bfloat16()
    y = ops.linear(x, w)
    torch.testing.assert_close(y[-1:], x[-1:] @ w.t())
    torch.testing.assert_close(y[:1], x[:1] @ w.t())


def test_cuda_fullgraph():
    x, w, b, r = (t.cuda() for t in PROBLEMS[1].inputs(torch.bfloat16))
    compiled = torch.compile(PROBLEMS[1].call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ops, x, w, b, r), PROBLEMS[1].call(ops, x, w, b, r), rtol=0, atol=0)
