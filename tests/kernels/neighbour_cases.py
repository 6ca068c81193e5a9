"""The kernels of norms, rotary embedding, gates and square sums in the interpreter, on views surrounded by NaN."""

import random
from dataclasses import replace

import torch
from bounds import UNIT, assert_no_worse_than_torch, assert_within, gamma
from interpreter import (
    SIZES,
    UNIT_HERE,
    case,
    each_dtype,
    only_within,
    poisoned,
    poisoned_output,
    random_cases,
    slow_case,
    with_gradients,
)
from neighbour_bounds import glu_bounds, norm_bound, norm_gradient_bounds, rope_bound

from tpmp_kernels import ops, reference

FLOAT = torch.float32


class Draw:
    """Random sizes and matrices from one seed, with a scale, and their poisoned surroundings."""

    def __init__(self, seed: int, dtype: torch.dtype):
        self.rng, self.dtype = random.Random(seed), dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.scale = self.rng.choice([1.0, 1.0, 300.0, 1e-4])

    def size(self) -> int:
        return max(1, self.rng.choice(SIZES))

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).mul(scale).to(self.dtype)

    def chance(self) -> bool:
        return self.rng.random() < 0.5

    def row(self, values: torch.Tensor) -> torch.Tensor:
        return poisoned(self.rng, values[None])[0]

    def maybe(self, values: torch.Tensor) -> torch.Tensor | None:
        return values if self.chance() else None


def within(named: dict):
    return only_within(t for t in named.values() if isinstance(t, torch.Tensor))


def assert_written(buffers: list[torch.Tensor], count: int) -> None:
    written = sum(int(buffer.isnan().logical_not().sum()) for buffer in buffers)  # an infinity may be right
    assert written == count, f"{written} elements written, expected {count}"


def rows_and_block(d: Draw, n: int, widest: int):
    """The shipped block of n columns and some rows, or a small block that goes through few rows in several steps."""
    from tpmp_kernels.kernels.norms import Block, block

    if d.chance():
        whole = block(n, widest)
        return d.size(), replace(whole, rows=d.rng.choice([whole.rows, 16]))
    return d.rng.choice([1, 3, 8, 9]), Block(d.rng.choice([1, 4]), 16, False, 4)


def check_norm(seed: int, dtype: torch.dtype) -> None:
    """One random norm: normed, h, mean and rstd."""
    from tpmp_kernels.kernels import norms

    d = Draw(seed, dtype)
    n, centered, eps = d.size(), d.chance(), d.rng.choice([1e-5, 1e-12])
    m, shape = rows_and_block(d, n, norms.WIDEST)
    x, weight = d.normal(m, n, scale=d.scale) + d.rng.choice([0.0, 3 * d.scale]), d.normal(n)
    bias = d.maybe(d.normal(n)) if centered else None
    residual = d.maybe(d.normal(m, n, scale=d.scale))
    (normed, normed_buffer), (h, h_buffer) = poisoned_output(m, n, dtype), poisoned_output(m, n, dtype)
    (mean, mean_buffer), (rstd, rstd_buffer) = poisoned_output(m, 1, FLOAT), poisoned_output(m, 1, FLOAT)
    named = norms.arguments(
        poisoned(d.rng, x), None if residual is None else poisoned(d.rng, residual), d.row(weight),
        None if bias is None else d.row(bias), normed, None if residual is None else h,
        mean if centered else None, rstd, eps, shape,
    )  # fmt: skip
    with within(named):
        norms.launch(norms.norm_kernel, named, -(-m // shape.rows), shape)

    unit = UNIT_HERE[dtype]
    if residual is None:
        h = x
    else:
        total = x.double() + residual.double()
        assert_within(h, total, 2 * unit * total.abs() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
    assert_within(normed, *norm_bound(h, weight, bias, eps, centered=centered, unit=unit))
    stored = [normed_buffer, h_buffer, mean_buffer, rstd_buffer]
    assert_written(stored, m * n * (1 + (residual is not None)) + m * (1 + centered))


def check_norm_backward(seed: int, dtype: torch.dtype) -> None:
    """One random gradient, for statistics that need not be those of h."""
    from tpmp_kernels.kernels import norms

    d = Draw(seed, dtype)
    n, centered = d.size(), d.chance()
    m, shape = rows_and_block(d, n, norms.WIDEST_GRADIENT)
    dnormed, h, weight = d.normal(m, n), d.normal(m, n, scale=d.scale), d.normal(n)
    dh = d.maybe(d.normal(m, n, scale=1 / d.scale))
    mean, rstd = torch.randn(m, 1, generator=d.generator) * d.scale, torch.rand(m, 1, generator=d.generator) / d.scale
    row_blocks = d.rng.choice([1, 2, 3]) if shape.whole else 1
    programs = -(-m // (shape.rows * row_blocks))
    dx, dx_buffer = poisoned_output(m, n, dtype)
    sums = [poisoned_output(programs, n, FLOAT) for _ in range(2)]
    named = norms.backward_arguments(
        poisoned(d.rng, dnormed), None if dh is None else poisoned(d.rng, dh), poisoned(d.rng, h), d.row(weight),
        mean if centered else None, rstd, dx, *(partial for partial, _ in sums), row_blocks, shape,
    )  # fmt: skip
    with within(named):
        norms.launch(norms.norm_backward_kernel, named, programs, shape)

    bounds = norm_gradient_bounds(dnormed, dh, h, weight, mean if centered else None, rstd, unit=UNIT_HERE[dtype])
    got = [dx, *(partial.sum(0).to(dtype) for partial, _ in sums)]
    for result, (oracle, bound) in zip(got, bounds, strict=True):
        assert_within(result, oracle, bound)
    assert_written([dx_buffer, *(buffer for _, buffer in sums)], m * n + 2 * programs * n)


def poisoned_heads(d: Draw, values: torch.Tensor) -> torch.Tensor:
    """The same [B, S, H, D] inside a buffer of NaN, with its first three dimensions in random order."""
    order = [*d.rng.sample(range(3), 3), 3]
    where = [order.index(i) for i in range(4)]
    buffer = torch.full([values.shape[i] + 1 for i in order], torch.nan, dtype=values.dtype)
    return buffer.permute(where)[tuple(slice(0, size) for size in values.shape)].copy_(values)


def check_rope(seed: int, dtype: torch.dtype) -> None:
    """q and k turned forward or back, with and without positions."""
    from tpmp_kernels.kernels import rope

    d = Draw(seed, dtype)
    batch, sequence, half, rest = (d.rng.choice(sizes) for sizes in ([1, 2, 3], [1, 5, 17], [1, 3, 16, 24], [0, 0, 5]))
    heads = d.rng.choice([1, 3, 12]), d.rng.choice([1, 2])
    q, k = (d.normal(batch, sequence, count, 2 * half + rest) for count in heads)
    table, inverse = reference.rope_table(40, 2 * half), d.chance()
    ids = d.rng.choice([None, [sequence], [batch, sequence]])
    ids = None if ids is None else torch.randint(40, ids, generator=d.generator)
    outputs = [poisoned_output(t.numel(), 1, dtype) for t in (q, k)]
    views = [flat.view(t.shape) for (flat, _), t in zip(outputs, (q, k), strict=True)]
    named = rope.arguments(poisoned_heads(d, q), poisoned_heads(d, k), table, ids, *views, inverse=inverse)
    with within(named):
        rope.rope_kernel[(-(-batch * sequence // named["BLOCK_T"]),)](**named)
    for got, x in zip(views, (q, k), strict=True):
        assert_within(got, *rope_bound(x, table, ids, inverse=inverse, unit=UNIT_HERE[dtype]))
    assert_written([buffer for _, buffer in outputs], q.numel() + k.numel())


@case
def rope_of_a_position_outside_the_table_is_nan() -> None:
    """It is not read, and no neighbour changes."""
    q, table = torch.randn(1, 4, 2, 6), reference.rope_table(8, 6)
    ids = torch.tensor([3, 8, -1, 7])
    with ops.use_backend("triton"):
        got, _ = ops.rope(q, q, table, ids)
    assert got[0, 1:3].isnan().all()
    torch.testing.assert_close(got[:, [0, 3]], reference.rope(q, q, table, ids.clamp(0, 7))[0][:, [0, 3]])


def check_glu(seed: int, dtype: torch.dtype) -> None:
    from tpmp_kernels.kernels import glu

    d = Draw(seed, dtype)
    m, n, activation = d.size(), d.size(), d.rng.choice(reference.GATES)
    gate, up, dy = (d.normal(m, n, scale=3.0) for _ in range(3))
    inside = [poisoned(d.rng, t) for t in (gate, up, dy)]
    got = [poisoned_output(m, n, dtype) for _ in range(3)]
    (y, _), (dgate, _), (dup, _) = got
    for named in (
        glu.arguments(*inside[:2], None, y, None, None, activation),
        glu.arguments(*inside, None, dgate, dup, activation),
    ):
        with within(named):
            glu.glu_kernel[(-(-n // glu.BLOCK_N), -(-m // glu.BLOCK_M))](**named)
    bounds = glu_bounds(dy, gate, up, activation, unit=UNIT_HERE[dtype])
    for (result, buffer), (oracle, bound) in zip(got, bounds, strict=True):
        assert_within(result, oracle, bound)
        assert_written([buffer], m * n)


def check_square_sum(seed: int, dtype: torch.dtype) -> None:
    """Several programs a row, several blocks a program, in the launcher and with as few programs as there may be."""
    from tpmp_kernels.kernels import square_sum

    d = Draw(seed, dtype)
    rows, n, programs = d.rng.choice([1, 2, 5]), d.rng.choice([1, 7, 1024, 1025, 3001]), d.rng.choice([1, 2, 3])
    x, _ = poisoned_output(rows, n, dtype)
    x.copy_(d.normal(rows, n, scale=d.scale))
    partial = torch.full((rows, programs), torch.nan, dtype=torch.float64)
    named = square_sum.arguments(x, partial)
    with within(named):
        square_sum.square_sum_kernel[(programs, rows)](**named)
    exact = x.double().square().sum(1)
    for sums in (partial.sum(1), square_sum.square_sums(x)):
        assert_within(sums, exact, gamma(2 * n, UNIT[torch.float64]) * exact)


def check_empty(dtype: torch.dtype) -> None:
    """No rows and no columns, in every launcher."""
    from tpmp_kernels.kernels import glu, norms, rope, square_sum

    for m, n in ((0, 5), (5, 0)):
        x, weight, rstd = torch.ones(m, n, dtype=dtype), torch.ones(n, dtype=dtype), torch.ones(m)
        normed, h, mean, _ = norms.norm(x, weight, weight, x, 1e-5, centered=True)
        assert normed.shape == h.shape == (m, n) and mean.shape == (m,)
        dx, dweight, dbias = norms.norm_backward(x, x, x, weight, rstd, rstd, need_weight=True, need_bias=True)
        assert dx.shape == (m, n) and dweight.shape == dbias.shape == (n,) and not (dweight.any() or dbias.any())
        assert glu.glu(x, x, "silu").shape == glu.glu_backward(x, x, x, "silu")[0].shape == (m, n)
        assert torch.equal(square_sum.square_sums(x), torch.zeros(m, dtype=torch.float64))
    q, k = torch.ones(2, 0, 3, 8, dtype=dtype), torch.ones(2, 0, 1, 8, dtype=dtype)
    assert [t.shape for t in rope.rope(q, k, reference.rope_table(4, 8), None)] == [q.shape, k.shape]


@slow_case
def wide_rows() -> None:
    """8192 columns stay in registers, 20000 go in steps; a large mean beside a small variance loses no digits."""
    from tpmp_kernels.kernels import norms

    dtype, generator = torch.bfloat16, torch.Generator().manual_seed(3)
    for n in (8192, 20000):
        x = torch.randn(3, n, generator=generator).add(100.0).to(dtype)
        weight, bias, dy = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((n,), (n,), (3, n)))
        normed, _, mean, rstd = norms.norm(x, weight, bias, None, 1e-5, centered=True)
        assert_within(normed, *norm_bound(x, weight, bias, 1e-5, centered=True, unit=UNIT_HERE[dtype]))
        wide = x.double()
        torch.testing.assert_close(mean.double(), wide.mean(1), rtol=1e-6, atol=0)
        torch.testing.assert_close(rstd.double(), (wide.var(1, correction=0) + 1e-5).rsqrt(), rtol=1e-5, atol=0)
        got = norms.norm_backward(dy, None, x, weight, mean, rstd, need_weight=True, need_bias=True)
        bounds = norm_gradient_bounds(dy, None, x, weight, mean[:, None], rstd[:, None], unit=UNIT_HERE[dtype])
        for result, (oracle, bound) in zip(got, bounds, strict=True):
            assert_within(result, oracle, bound)


@case
def many_rows_share_partial_sums() -> None:
    """More blocks of rows than partial sums: a program adds several, in the same order on every run."""
    from tpmp_kernels.kernels import norms

    partials, norms._PARTIALS = norms._PARTIALS, 2
    try:
        x, dy, weight = torch.randn(300, 3), torch.randn(300, 3), torch.randn(3)
        _, _, _, rstd = norms.norm(x, weight, None, None, 1e-5, centered=False)
        calls = [norms.norm_backward(dy, None, x, weight, None, rstd, need_weight=True, need_bias=False) for _ in "ab"]
    finally:
        norms._PARTIALS = partials
    assert all(torch.equal(a, b) for a, b in zip(calls[0][:2], calls[1][:2], strict=True))
    bounds = norm_gradient_bounds(dy, None, x, weight, None, rstd[:, None])
    for result, (oracle, bound) in zip(calls[0][:2], bounds, strict=False):
        assert_within(result, oracle, bound)


@case
def neighbour_gradients() -> None:
    """The ops with the Triton backend, forward and backward: no worse than twice torch."""
    torch.manual_seed(0)
    x, residual, weight, bias = (torch.randn(*s, requires_grad=True) for s in ((4, 16, 33), (4, 16, 33), (33,), (33,)))
    q, k = torch.randn(2, 8, 5, 6, requires_grad=True), torch.randn(2, 2, 5, 6, requires_grad=True)
    table, ids = reference.rope_table(9, 4), torch.tensor([[0, 3, 3, 8, 1], [5, 4, 3, 2, 1]])
    both = torch.cat
    calls = [
        (lambda r, x, w: r.rms_norm(x, w), [x, weight]),
        (lambda r, x, w, h: both(r.rms_norm(x, w, residual=h)), [x, weight, residual]),
        (lambda r, x, w: r.layer_norm(x.transpose(0, 1), w), [x, weight]),
        (lambda r, x, w, b, h: both(r.layer_norm(x, w, b, residual=h)), [x, weight, bias, residual]),
        *((lambda r, x, u, a=a: r.glu(x, u, activation=a), [x, residual]) for a in reference.GATES),
        (lambda r, q, k: both(r.rope(q.transpose(1, 2), k.transpose(1, 2), table, ids), dim=2), [q, k]),
    ]
    for call, inputs in calls:
        with ops.use_backend("triton"):
            y = call(ops, *inputs)
            upstream = torch.randn_like(y)
            got = with_gradients(y, inputs, upstream)
        eager = with_gradients(call(reference, *inputs), inputs, upstream)
        wide = [t.detach().double().requires_grad_() for t in inputs]
        oracle = with_gradients(call(reference, *wide), wide, upstream.double())
        for ours, theirs, exact in zip(got, eager, oracle, strict=True):
            assert_no_worse_than_torch(ours, theirs, exact, least=1)


@case
def gradient_norm() -> None:
    """ops.grad_norm with the Triton backend: cut into leaves along any dimension, the bits of its whole leaves."""
    grads = [torch.randn(16, 24), None, torch.randn(5).half(), torch.randn(8, 4, 3).bfloat16()]
    with ops.use_backend("triton"):
        got = ops.grad_norm(grads, sharded=[1, 0, None, 0], leaves=8)
    torch.testing.assert_close(got, reference.grad_norm(grads), rtol=1e-14, atol=0)


each_dtype("neighbours_empty", check_empty)
random_cases("norm", check_norm, sample=2)
random_cases("norm_backward", check_norm_backward, sample=2)
random_cases("rope", check_rope, sample=2)
random_cases("glu", check_glu, sample=2)
random_cases("square_sum", check_square_sum, sample=2)
