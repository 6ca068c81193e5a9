"""Norms, rotary embedding, gates and the gradient norm on a CUDA device: bounds, strides, the same bits each time."""

import pytest
import torch
from bounds import UNIT, assert_within
from neighbour_bounds import glu_bounds, norm_bound, norm_gradient_bounds, rope_bound

from tpmp_kernels import ops, reference

pytestmark = pytest.mark.gpu
HALF = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 1), (0, 5), (67, 131), (2048, 4096), (33, 16381), (9, 20480), (20000, 256)]
each_dtype = pytest.mark.parametrize("dtype", HALF, ids=str)


def draw(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, device="cuda").mul(scale).to(dtype)


@each_dtype
@pytest.mark.parametrize("centered", [False, True], ids=["rms_norm", "layer_norm"])
@pytest.mark.parametrize(
    "shape", [(1, 1), (0, 5), (67, 131), (2048, 4096), (33, 16381), (9, 20480), (20000, 256)], ids=str
)
def test_cuda_norms_are_within_their_bounds(dtype, centered, shape):
    torch.manual_seed(0)
    (m, n), scale = shape, 300.0 if dtype is torch.float16 else 1.0
    x, residual, dh = draw(n, m, dtype=dtype, scale=scale).t(), draw(m, n, dtype=dtype), draw(m, n, dtype=dtype)
    weight, bias, dnormed = draw(n, dtype=dtype), draw(n, dtype=dtype), draw(m, n, dtype=dtype)
    if centered:
        normed, h = ops.layer_norm(x, weight, bias, residual=residual)
    else:
        normed, h = ops.rms_norm(x, weight, residual=residual)
    assert torch.equal(h, x + residual)
    assert_within(normed, *norm_bound(h, weight, bias if centered else None, 1e-5, centered=centered))

    wide = h.float()
    mean = wide.mean(-1, keepdim=True) if centered else None
    rstd = ((wide if mean is None else wide - mean).square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    op = torch.ops.tpmp_kernels
    got, again = (
        op.layer_norm_backward(dnormed, dh, h, weight, mean, rstd, True, True)
        if centered
        else op.rms_norm_backward(dnormed, dh, h, weight, rstd, True)
        for _ in range(2)
    )
    for result, (oracle, bound) in zip(got, norm_gradient_bounds(dnormed, dh, h, weight, mean, rstd), strict=False):
        assert_within(result, oracle, bound)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@each_dtype
@pytest.mark.parametrize("rest", [0, 32])
def test_cuda_rope_takes_any_strides_and_marks_unknown_positions(dtype, rest):
    q, k = draw(2, 12, 257, 64 + rest, dtype=dtype).transpose(1, 2), draw(2, 257, 3, 64 + rest, dtype=dtype)
    table = ops.rope_table(1000, 64, device="cuda")
    ids = torch.randint(1000, (2, 257), device="cuda")
    for positions in (None, ids, ids[0]):
        for got, x in zip(ops.rope(q, k, table, positions), (q, k), strict=True):
            assert got.is_contiguous()
            assert_within(got, *rope_bound(x, table, positions))
    ids[1, 5], ids[0, 3] = 1000, -1
    got, _ = ops.rope(q, k, table, ids)
    assert got.isfinite().all(-1).all(-1).sum() == 2 * 257 - 2


@each_dtype
@pytest.mark.parametrize("activation", reference.GATES)
def test_cuda_glu_is_within_its_bounds(dtype, activation):
    gate, up = draw(513, 2 * 1411, dtype=dtype, scale=3.0).chunk(2, dim=-1)
    dy = draw(1411, 513, dtype=dtype).t()
    gate, up = gate.requires_grad_(), up.requires_grad_()
    y = ops.glu(gate, up, activation=activation)
    got = [y.detach(), *torch.autograd.grad(y, [gate, up], dy)]
    for result, (oracle, bound) in zip(got, glu_bounds(dy, gate.detach(), up.detach(), activation), strict=True):
        assert_within(result, oracle, bound)


@pytest.mark.parametrize("dtype", UNIT, ids=str)
def test_cuda_norm_of_gradients_does_not_depend_on_the_cut(dtype):
    """Each leaf on its own, as on 8 ranks, and all at once, as on one: the same bits, along either dimension."""
    grad = draw(4096, 4096, dtype=dtype)
    op = torch.ops.tpmp_kernels.square_sums
    for dim in (0, 1):
        whole = op(grad, dim, 8)
        assert torch.equal(whole, torch.cat([op(part, dim, 1) for part in grad.chunk(8, dim)]))
        torch.testing.assert_close(whole.sum(), grad.double().square().sum(), rtol=1e-12, atol=0)
    norm = ops.grad_norm([grad, None], sharded=[1, 0], leaves=8)
    assert norm.is_cuda
    ops.clip_grads_([grad], norm, 1.0)
    torch.testing.assert_close(grad.double().norm(), torch.ones((), device="cuda").double(), rtol=1e-2, atol=0)


def test_cuda_offsets_past_two_to_the_31():
    """2^31 + 2^17 elements: the last row is right only with 64-bit offsets."""
    m, n = 2**15 + 2, 2**16
    if torch.cuda.mem_get_info()[0] < 5 * m * n * 2:
        pytest.skip("needs 22 GB of free GPU memory")
    x, weight = (
        torch.empty(m, n, device="cuda", dtype=torch.bfloat16).normal_(),
        torch.ones(n, device="cuda").bfloat16(),
    )
    torch.testing.assert_close(ops.rms_norm(x, weight)[-1:], reference.rms_norm(x[-1:], weight))
    torch.testing.assert_close(ops.layer_norm(x, weight)[-1:], reference.layer_norm(x[-1:], weight))
    torch.testing.assert_close(ops.glu(x, x)[-1:], reference.glu(x[-1:].float(), x[-1:].float()).bfloat16())
