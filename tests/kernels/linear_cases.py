"""The linear kernels in the interpreter: random problems on random shipped tiles, exact integers, gradients."""

import random

import torch
from bounds import ACTIVATION_UNITS, UNIT, assert_no_worse_than_torch, assert_within, gamma, linear_bound
from interpreter import (
    SIZES,
    UNIT_HERE,
    case,
    each_dtype,
    only_within,
    poisoned,
    poisoned_output,
    random_cases,
    with_gradients,
)

from tpmp_kernels import ops, reference
from tpmp_kernels.kernels import tiles

ACTIVATIONS, GATES = (None, *reference.ACTIVATIONS), reference.GATES


def check_linear(seed: int, dtype: torch.dtype) -> None:
    """One random problem on one random shipped tile, launched on views whose surroundings are NaN."""
    from tpmp_kernels.kernels.linear import DTYPES as NAMES
    from tpmp_kernels.kernels.linear import arguments, launch, linear_kernel

    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    m, n, k = (rng.choice(SIZES) for _ in range(3))
    m, n = max(m, 1), max(n, 1)
    activation = rng.choice(ACTIVATIONS)
    bias, residual = (draw(n) if rng.random() < 0.5 else None), (draw(m, n) if rng.random() < 0.5 else None)
    epilogue = tiles.Epilogue(activation, bias is not None, residual is not None, rng.random() < 0.5)
    tile = rng.choice(tiles.shipped(k, NAMES[dtype], arch=90, epilogue=epilogue))
    x, weight = draw(m, k), draw(n, k)
    (y, y_buffer), (z, z_buffer) = poisoned_output(m, n, dtype), poisoned_output(m, n, dtype)
    named = arguments(
        poisoned(rng, x), poisoned(rng, weight), None if bias is None else poisoned(rng, bias[None])[0],
        None if residual is None else poisoned(rng, residual), y, z if epilogue.preact else None, activation, tile,
    )  # fmt: skip
    with only_within(t for t in named.values() if isinstance(t, torch.Tensor)):
        launch(linear_kernel, named, tile)

    unit = UNIT_HERE[dtype]
    oracle, bound = linear_bound(x, weight, bias, activation=activation, residual=residual, unit=unit)
    assert_within(y, oracle, bound)
    eager = reference.linear(x, weight, bias, activation=activation, residual=residual)
    assert_no_worse_than_torch(y, eager, oracle, unit)
    if epilogue.preact:
        assert_within(z, *linear_bound(x, weight, bias, unit=unit))
    written = m * n * (1 + epilogue.preact)
    finite = int(y_buffer.isfinite().sum() + z_buffer.isfinite().sum())
    assert finite == written, f"{finite} elements written, expected {written}"


def check_activation_grad(seed: int, dtype: torch.dtype) -> None:
    """One random dz and bias gradient, against the derivative that autograd gives in fp64."""
    from tpmp_kernels.kernels.activation_grad import activation_grad

    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    m, n = rng.choice(SIZES), rng.choice(SIZES)
    activation = rng.choice(list(reference.ACTIVATIONS))
    dy, z = (torch.randn(m, n, generator=generator).mul(3).to(dtype) for _ in range(2))
    dz, dbias = activation_grad(poisoned(rng, dy), z, activation, bias=True)

    unit, wide = UNIT_HERE[dtype], UNIT[torch.float32]
    oracle = dy.double() * reference.activation_derivative(z.double(), activation)
    rounding = ACTIVATION_UNITS * wide * dy.double().abs()  # act' itself, evaluated in fp32: it does not grow with z
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert_within(dz, oracle, rounding + unit * (oracle.abs() + rounding) + tiny)
    error = rounding.sum(0) + gamma(m + 1, wide) * oracle.abs().sum(0)
    assert_within(dbias, oracle.sum(0), error + unit * (oracle.sum(0).abs() + error) + tiny)


def check_integers(dtype: torch.dtype) -> None:
    """Sums of small integers are exact in any order: every bit must agree, whatever the tile."""
    from tpmp_kernels.kernels.linear import linear

    for m, n, k in ((67, 131, 64), (1, 300, 127), (129, 1, 97)):
        x, weight = torch.randint(-1, 2, (m, k)).to(dtype), torch.randint(-1, 2, (n, k)).to(dtype)
        bias, residual = torch.randint(-3, 4, (n,)).to(dtype), torch.randint(-3, 4, (m, n)).to(dtype)
        y, z = linear(x, weight, bias, residual, "relu", store_preact=True)
        exact = x.double() @ weight.double().t() + bias.double()
        assert torch.equal(z.double(), exact)
        assert torch.equal(y.double(), exact.relu() + residual.double())


def check_empty(dtype: torch.dtype) -> None:
    """No rows or no columns give an empty result; no inner dimension gives act(bias)."""
    from tpmp_kernels.kernels.linear import linear

    for m, n in ((0, 5), (5, 0), (0, 0)):
        y, z = linear(torch.ones(m, 3, dtype=dtype), torch.ones(n, 3, dtype=dtype), store_preact=True)
        assert y.shape == z.shape == (m, n)
    bias = torch.tensor([-1.0, 2.0], dtype=dtype)
    y, _ = linear(torch.ones(3, 0, dtype=dtype), torch.ones(2, 0, dtype=dtype), bias, None, "relu")
    assert torch.equal(y, bias.relu().expand(3, 2))


@case
def op_gradients() -> None:
    """ops.linear and ops.gated_linear with the Triton backend, forward and backward: no worse than twice torch."""
    torch.manual_seed(0)
    x, weight, other, bias = (torch.randn(*s, requires_grad=True) for s in ((4, 16, 33), (48, 33), (48, 33), (48,)))
    upstream = torch.randn(4, 16, 48)
    calls = [(lambda r, x, w, b, a=a: r.linear(x, w, b, activation=a), [x, weight, bias]) for a in ACTIVATIONS]
    calls += [(lambda r, x, g, u, a=a: r.gated_linear(x, g, u, activation=a), [x, weight, other]) for a in GATES]
    for call, inputs in calls:
        with ops.use_backend("triton"):
            got = with_gradients(call(ops, *inputs), inputs, upstream)
        eager = with_gradients(call(reference, *inputs), inputs, upstream)
        wide = [t.detach().double().requires_grad_() for t in inputs]
        oracle = with_gradients(call(reference, *wide), wide, upstream.double())
        for ours, theirs, exact in zip(got, eager, oracle, strict=True):
            assert_no_worse_than_torch(ours, theirs, exact, least=1)


each_dtype("integers", check_integers)
each_dtype("empty", check_empty)
random_cases("linear", check_linear, sample=40)
random_cases("activation_grad", check_activation_grad, sample=15)
