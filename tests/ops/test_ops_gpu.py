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
    eager = reference.linear(x, w, b, activation=activation, residual=r)
    for saved in (False, True):
        y = ops.linear(x, w.requires_grad_(saved), b, activation=activation, residual=r).detach()
        _, choice = ops.explain(ops.linear, x, w, b, activation=activation, residual=r, training=saved).products[0]
        unfused = dtype is torch.float64 or choice.tile is None
        oracle, bound = linear_bound(x, w.detach(), b, activation=activation, residual=r, unfused=unfused)
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


@pytest.mark.parametrize("k", [16, 17], ids=["descriptors", "pointers"])
def test_cuda_offsets_past_two_to_the_31(k):
    """Y has 2^31 + 2^16 elements: its last row is right only with 64-bit offsets."""
    m, n = 2**15 + 1, 2**16
    if torch.cuda.mem_get_info()[0] < 3 * m * n * 2:
        pytest.skip("needs 13 GB of free GPU memory")
    x, w = torch.randn(m, k, device="cuda").bfloat16(), torch.randn(n, k, device="cuda").bfloat16()
    assert ops.explain(ops.linear, x, w, activation="relu2", training=False).products[0][1].tile is not None
    y = ops.linear(x, w, activation="relu2")
    for row in (slice(-1, None), slice(1)):
        torch.testing.assert_close(y[row], reference.linear(x[row].float(), w.float(), activation="relu2").bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(9000, 1024, 512), (4099, 129, 257), (300_000, 8, 8)], ids=str)
def test_cuda_split_weight_gradients_are_exact_in_integers_and_the_same_again(dtype, shape):
    """Few tiles, many tokens: parts of the tokens are added in order."""
    from tpmp_kernels.kernels.wgrad import wgrad

    tokens, n, k = shape
    dz, x = (torch.randint(-1, 2, (tokens, width), device="cuda").to(dtype) for width in (n, k))
    main_grad = torch.full((n, k), 7.0, device="cuda")
    wgrad(dz, x, main_grad, add=True)
    assert torch.equal(main_grad.double(), 7 + dz.double().t() @ x.double())
    for _ in range(3):
        again = torch.full((n, k), 7.0, device="cuda")
        wgrad(dz, x, again, add=True)
        assert torch.equal(again, main_grad)


def test_cuda_capture_into_a_graph():
    """Every GEMM of a gated MLP, forward and backward, captured once and replayed on other numbers."""
    torch.manual_seed(0)
    shapes = ((64, 128), (256, 128), (256, 128), (128, 256))
    x, gate, up, down = (torch.randn(s, device="cuda").bfloat16().requires_grad_() for s in shapes)

    def step():
        y = ops.gated_mlp(x, gate, up, down)
        return y, *torch.autograd.grad(y, [x, gate, up, down], torch.ones_like(y))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    for ours, eager in zip(captured, step(), strict=True):
        assert torch.equal(ours, eager)


def test_cuda_fullgraph():
    x, w, b, r = (t.cuda() for t in PROBLEMS[1].inputs(torch.bfloat16))
    compiled = torch.compile(PROBLEMS[1].call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ops, x, w, b, r), PROBLEMS[1].call(ops, x, w, b, r), rtol=0, atol=0)
