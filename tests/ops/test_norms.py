"""ops.rms_norm and ops.layer_norm on the CPU: within their bounds in every dtype and scale, and what they keep."""

import random

import pytest
import torch
from bounds import UNIT, assert_within
from neighbour_bounds import norm_bound, norm_gradient_bounds

from tpmp_kernels import ops, reference

SIZES = (1, 2, 3, 7, 16, 31, 97, 130)
each_norm = pytest.mark.parametrize("centered", [False, True], ids=["rms_norm", "layer_norm"])
each_dtype = pytest.mark.parametrize("dtype", UNIT, ids=str)
seeds = pytest.mark.parametrize("seed", [*range(2), *(pytest.param(s, marks=pytest.mark.full) for s in range(2, 80))])


class Draw:
    def __init__(self, seed: int, dtype: torch.dtype):
        self.rng, self.dtype, self.generator = random.Random(seed), dtype, torch.Generator().manual_seed(seed)
        self.m, self.n = self.rng.choice(SIZES), self.rng.choice(SIZES)
        self.scale = self.rng.choice([1.0, 300.0, 1e-4])

    def tensor(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        drawn = torch.randn(shape, generator=self.generator, dtype=torch.float64).mul(scale).to(self.dtype)
        return drawn if self.chance() else drawn.t().contiguous().t()

    def chance(self) -> bool:
        return self.rng.random() < 0.5


def norm(room, centered: bool, x, weight, bias=None, **options):
    return room.layer_norm(x, weight, bias, **options) if centered else room.rms_norm(x, weight, **options)


@each_dtype
@each_norm
@seeds
def test_norm_is_within_its_bound(dtype, centered, seed):
    d = Draw(seed, dtype)
    x, weight, eps = d.tensor(d.m, d.n, scale=d.scale), d.tensor(d.n), d.rng.choice([1e-5, 1e-12])
    bias = d.tensor(d.n) if centered and d.chance() else None
    residual = d.tensor(d.m, d.n, scale=d.scale) if d.chance() else None
    got = norm(ops, centered, x, weight, bias, residual=residual, eps=eps)
    normed, h = (got, x) if residual is None else got
    assert residual is None or torch.equal(h, x + residual)
    assert_within(normed, *norm_bound(h, weight, bias, eps, centered=centered))


@each_dtype
@each_norm
@seeds
def test_gradients_are_within_their_bounds(dtype, centered, seed):
    """For statistics that need not be those of h, so that nothing else than the backward itself is measured."""
    d = Draw(seed, dtype)
    dnormed, h, weight = d.tensor(d.m, d.n), d.tensor(d.m, d.n, scale=d.scale), d.tensor(d.n)
    dh = d.tensor(d.m, d.n, scale=1 / d.scale) if d.chance() else None
    wide = torch.promote_types(dtype, torch.float32)
    mean, rstd = (torch.rand(d.m, 1, generator=d.generator, dtype=wide) * s for s in (d.scale, 1 / d.scale))
    if centered:
        got = torch.ops.tpmp_kernels.layer_norm_backward(dnormed, dh, h, weight, mean, rstd, True, True)
    else:
        got = torch.ops.tpmp_kernels.rms_norm_backward(dnormed, dh, h, weight, rstd, True)
    bounds = norm_gradient_bounds(dnormed, dh, h, weight, mean if centered else None, rstd)
    for result, (oracle, bound) in zip(got, bounds, strict=False):
        assert result.dtype == dtype
        assert_within(result, oracle, bound)


@each_norm
def test_many_rows_are_added_as_precisely_as_few(centered):
    """16384 ones and their rounding: added one by one in fp32, the error would be a hundred times the bound here."""
    dy, x = torch.rand(16384, 4) + 0.5, torch.randn(16384, 4)
    weight = torch.ones(4, requires_grad=True)
    bias = torch.zeros(4, requires_grad=True) if centered else None
    inputs = [weight, bias] if centered else [weight]
    got = torch.autograd.grad(norm(ops, centered, x, weight, bias), inputs, dy)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    exact = torch.autograd.grad(norm(reference, centered, x.double(), *wide), wide, dy.double())
    for ours, truth in zip(got, exact, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=0, atol=16 * UNIT[torch.float32] * 16384)


@each_norm
def test_fp64_forward_is_the_reference_to_the_bit(centered):
    x, r, w = (torch.randn(shape, dtype=torch.float64) for shape in ((3, 5, 7), (3, 5, 7), (7,)))
    got, expected = (norm(room, centered, x, w, *([w] * centered), residual=r) for room in (ops, reference))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@each_norm
@pytest.mark.parametrize("scale", [300.0, 1e-4])
def test_statistics_are_wide(centered, scale):
    """Squares of 300 overflow fp16 and squares of 1e-4 vanish in it: the statistics must not be taken there."""
    x = torch.full((4, 512), scale, dtype=torch.float16)
    x[:, ::2] *= -1
    y = norm(ops, centered, x, torch.ones(512, dtype=torch.float16), eps=1e-20)
    torch.testing.assert_close(y.abs(), torch.ones_like(y))


@each_dtype
def test_layer_norm_beside_a_large_mean(dtype):
    """mean(h^2) - mean(h)^2 would lose the variance altogether."""
    x = torch.where(torch.rand(5, 128) < 0.5, 1000.0, 1001.0 if dtype in (torch.float32, torch.float64) else 1008.0)
    x, weight = x.to(dtype), torch.ones(128, dtype=dtype)
    assert_within(ops.layer_norm(x, weight), *norm_bound(x, weight, None, 1e-5, centered=True))


@each_norm
@pytest.mark.parametrize("shape", [(7,), (0, 7), (2, 0, 7), (1, 7), (2, 3, 4, 7), (5, 1), (3, 0)], ids=str)
def test_any_shape(centered, shape):
    x, w = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in (shape, shape[-1:]))
    got, expected = (norm(room, centered, x, w, residual=x.detach())[0] for room in (ops, reference))
    torch.testing.assert_close(got, expected)
    upstream = torch.randn_like(got)
    torch.testing.assert_close(*(torch.autograd.grad(y, [x, w], upstream) for y in (got, expected)))


@each_norm
@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)], ids=str)
def test_either_result_may_stay_unused(centered, used):
    """The normed result, the stream, or both: what is unused adds nothing and makes no zeros of its own."""
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 7), (7,), (3, 7))]

    def gradients(room):
        x, w, r = inputs
        results = norm(room, centered, x, w, residual=r)
        return torch.autograd.grad([results[i].square().sum() for i in used], inputs, allow_unused=True)

    for ours, theirs in zip(gradients(ops), gradients(reference), strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.allclose(ours, theirs, rtol=1e-12)


@each_norm
def test_the_stream_the_weight_and_the_statistics_are_kept_and_nothing_else(centered):
    kept = []
    x, w, r = torch.randn(6, 32, requires_grad=True), torch.ones(32, requires_grad=True), torch.randn(6, 32)
    for residual in (None, r):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            results = norm(ops, centered, x, w, residual=residual)
        h = x if residual is None else results[1]
        sizes = sorted(t.numel() for t in kept)
        assert sizes == sorted([h.numel(), 32, *[6] * (1 + centered)])
        assert h.data_ptr() in {t.data_ptr() for t in kept}


@each_norm
def test_gradients_are_the_same_bits_on_any_number_of_threads(centered):
    threads, results = torch.get_num_threads(), []
    x, dy, w = torch.randn(3000, 33, requires_grad=True), torch.randn(3000, 33), torch.ones(33, requires_grad=True)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(torch.autograd.grad(norm(ops, centered, x, w), [x, w], dy))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


X, W = torch.zeros(2, 64), torch.zeros(64)
REFUSED = [
    (lambda: ops.layer_norm(X, torch.zeros(63)), ValueError, "layer_norm: weight must have shape [64], got [63]"),
    (lambda: ops.layer_norm(X, W, torch.zeros(1)), ValueError, "layer_norm: bias must have shape [64], got [1]"),
    (lambda: ops.layer_norm(X, W, residual=W), ValueError, "layer_norm: residual must have shape [2, 64], got [64]"),
    (lambda: ops.layer_norm(X[0, 0], W), ValueError, "layer_norm: x must have at least one dimension, got a scalar"),
    (lambda: ops.rms_norm(X[0, 0], W), ValueError, "rms_norm: x must have at least one dimension, got a scalar"),
    (lambda: ops.layer_norm(X, W, W.double()), TypeError, "layer_norm: bias has dtype torch.float64 but x has"),
]


@pytest.mark.parametrize(("call", "kind", "text"), REFUSED, ids=[text for _, _, text in REFUSED])
def test_refused_in_one_sentence(call, kind, text):
    with pytest.raises(kind) as error:
        call()
    assert str(error.value).startswith(text) and "\n" not in str(error.value)
