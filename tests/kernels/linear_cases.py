"""The kernels of the linear family in the interpreter: random problems on random shipped tiles, integers, gradients."""

import random
from unittest import mock

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
WIDE = UNIT[torch.float32]


class Draw:
    """Everything random about a case: sizes, operands, layouts and a shipped tile."""

    def __init__(self, seed: int, dtype: torch.dtype):
        self.rng, self.generator, self.dtype = random.Random(seed), torch.Generator().manual_seed(seed), dtype

    def sizes(self) -> tuple[int, int, int]:
        m, n, k = (self.rng.choice(SIZES) for _ in range(3))
        return max(m, 1), max(n, 1), k

    def tensor(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype)

    def chance(self) -> bool:
        return self.rng.random() < 0.5

    def poisoned(self, values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else poisoned(self.rng, values)

    def tile(self, operation: str, epilogue: tiles.Epilogue, *operands: torch.Tensor) -> tiles.Tile:
        """A shipped tile of any architecture that takes these operands."""
        import triton

        from tpmp_kernels.kernels.gemm import DTYPES
        from tpmp_kernels.kernels.layout import aligned

        return self.rng.choice(
            tiles.shipped(
                operation, DTYPES[self.dtype], arch=self.rng.choice(["sm90", "sm90", "sm80", "gfx942"]),
                epilogue=epilogue, triton_version=triton.__version__, aligned=all(map(aligned, operands)),
            )
        )  # fmt: skip


def launch_within(kernel, named: dict, tile: tiles.Tile, *, splits: int = 1) -> None:
    """Launch it as on a chip of two multiprocessors, so that persistent programs take several tiles."""
    from tpmp_kernels.kernels import gemm

    memory = [getattr(value, "base", value) for value in named.values()]
    with (
        only_within(t for t in memory if isinstance(t, torch.Tensor)),
        mock.patch.object(gemm, "chip", lambda _: ("", 2)),
    ):
        gemm.launch(kernel, named, tile, torch.device("cpu"), splits=splits)


def assert_written(elements: int, *buffers: torch.Tensor) -> None:
    finite = sum(int(buffer.isfinite().sum()) for buffer in buffers)
    assert finite == elements, f"{finite} elements written, expected {elements}"


def tiny(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def rounded(value: torch.Tensor, error: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The bound of a value with an error, once it is stored in dtype."""
    return error + UNIT_HERE[dtype] * (value.abs() + error) + tiny(dtype)


def check_linear(seed: int, dtype: torch.dtype) -> None:
    """One random problem on one random shipped tile, launched on views whose surroundings are NaN."""
    from tpmp_kernels.kernels.linear import arguments, linear_kernel

    draw = Draw(seed, dtype)
    m, n, k = draw.sizes()
    activation = draw.rng.choice(ACTIVATIONS)
    out = torch.float32 if draw.chance() else dtype
    bias = draw.tensor(n) if draw.chance() else None
    residual = draw.tensor(m, n).to(draw.rng.choice([dtype, out])) if draw.chance() else None
    e = tiles.Epilogue(activation, bias is not None, residual is not None, draw.chance(), wide=out is not dtype)
    x, weight = draw.tensor(m, k), draw.tensor(n, k)
    inside = draw.poisoned(x), draw.poisoned(weight)
    tile = draw.tile("linear", e, *inside)
    (y, y_buffer), (z, z_buffer) = poisoned_output(m, n, out), poisoned_output(m, n, out)
    wants_y = not e.preact or draw.rng.random() < 0.7  # or z alone, as a backward makes it again
    named = arguments(
        *inside, None if bias is None else draw.poisoned(bias[None])[0],
        draw.poisoned(residual), y if wants_y else None, z if e.preact else None, activation, tile,
    )  # fmt: skip
    launch_within(linear_kernel, named, tile)

    unit = UNIT_HERE[out]
    if wants_y:
        oracle, bound = linear_bound(x, weight, bias, activation=activation, residual=residual, unit=unit)
        assert_within(y, oracle, bound)
        eager = reference.linear(x, weight, bias, activation=activation, residual=residual, out_dtype=out)
        assert_no_worse_than_torch(y, eager, oracle, unit)
    if e.preact:
        assert_within(z, *linear_bound(x, weight, bias, unit=unit))
    assert_written(m * n * (wants_y + e.preact), y_buffer, z_buffer)


def product_bound(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(X @ W^T in fp64, the error of an fp32 accumulator)."""
    x, weight = x.double(), weight.double()
    return x @ weight.t(), gamma(x.shape[1] + 2, WIDE) * (x.abs() @ weight.abs().t())


def activated_bound(z: torch.Tensor, error: torch.Tensor, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    y = reference.activate(z, activation)
    return y, 1.13 * error + ACTIVATION_UNITS * WIDE * (z.abs() + y.abs())


def times(a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]) -> tuple:
    """(value, error) of a product of two such, one rounding in fp32 included."""
    value = a[0] * b[0]
    return value, a[1] * b[0].abs() + b[1] * a[0].abs() + a[1] * b[1] + WIDE * value.abs()


def check_gated_linear(seed: int, dtype: torch.dtype) -> None:
    """Two accumulators over shared X tiles: y, gate and up, each within its bound, nothing else written."""
    from tpmp_kernels.kernels.gated_linear import arguments, gated_linear_kernel

    draw = Draw(seed, dtype)
    m, n, k = draw.sizes()
    e = tiles.Epilogue(draw.rng.choice(GATES), preact=draw.chance())
    x, w_gate, w_up = draw.tensor(m, k), draw.tensor(n, k), draw.tensor(n, k)
    inside = [draw.poisoned(each) for each in (x, w_gate, w_up)]
    tile = draw.tile("gated_linear", e, *inside)
    (y, *y_buffer), (gate, *gate_buffer), (up, *up_buffer) = (poisoned_output(m, n, dtype) for _ in range(3))
    named = arguments(
        *inside, y, gate if e.preact else None, up if e.preact else None, e.activation, tile,
    )  # fmt: skip
    launch_within(gated_linear_kernel, named, tile)

    g, u = product_bound(x, w_gate), product_bound(x, w_up)
    oracle, error = times(activated_bound(*g, e.activation), u)
    assert_within(y, oracle, rounded(oracle, error, dtype))
    eager = reference.gated_linear(x, w_gate, w_up, activation=e.activation)
    assert_no_worse_than_torch(y, eager, oracle, UNIT_HERE[dtype])
    if e.preact:
        for got, (value, off) in ((gate, g), (up, u)):
            assert_within(got, value, rounded(value, off, dtype))
    assert_written(m * n * (1 + 2 * e.preact), *y_buffer, *gate_buffer, *up_buffer)


def check_wgrad(seed: int, dtype: torch.dtype) -> None:
    """dZ^T @ X written to, or added to, an fp32 accumulator inside a buffer of NaN."""
    from tpmp_kernels.kernels.wgrad import arguments, wgrad_kernel

    draw = Draw(seed, dtype)
    n, k, tokens = draw.sizes()
    add = draw.chance()
    dz, x = draw.tensor(tokens, n), draw.tensor(tokens, k)
    inside = draw.poisoned(dz), draw.poisoned(x)
    tile = draw.tile("wgrad", tiles.Epilogue(residual=add), *inside)
    main_grad, buffer = poisoned_output(n, k, torch.float32)
    before = torch.randn(n, k, generator=draw.generator) if add else torch.zeros(n, k)
    if add:
        main_grad.copy_(before)
    launch_within(wgrad_kernel, arguments(*(each.t() for each in inside), main_grad, add, tile), tile)

    product, error = product_bound(dz.t(), x.t())
    oracle = before.double() + product
    assert_within(main_grad, oracle, error + 2 * WIDE * (oracle.abs() + error) + tiny(torch.float32))
    assert_written(n * k, buffer)


def check_mlp_dz(seed: int, dtype: torch.dtype) -> None:
    """The down layer's dgrad with the derivative in its epilogue, plain and gated: dz, dup, h and the bias gradient."""
    from tpmp_kernels.kernels.mlp import arguments, mlp_dz_kernel

    draw = Draw(seed, dtype)
    m, n, k = draw.sizes()
    gated, need_h = draw.chance(), draw.chance()
    bias = not gated and draw.chance()
    activation = draw.rng.choice(GATES if gated else list(reference.ACTIVATIONS))
    dy, w_down, z, up = draw.tensor(m, k), draw.tensor(k, n), draw.tensor(m, n), draw.tensor(m, n)
    inside = draw.poisoned(dy), draw.poisoned(w_down)
    tile = draw.tile("mlp_dz", tiles.Epilogue(activation, bias=bias, residual=gated, preact=need_h), *inside)
    (dz, *buffers), (dup, dup_buffer), (h, h_buffer) = (poisoned_output(m, n, dtype) for _ in range(3))
    blocks = -(-m // tile.block_m)
    partial, partial_buffer = poisoned_output(blocks, n, torch.float32)
    named = arguments(
        *inside, z, up if gated else None, dz, dup if gated else None,
        h if need_h else None, partial if bias else None, activation, tile,
    )  # fmt: skip
    launch_within(mlp_dz_kernel, named, tile)

    dh = product_bound(dy, w_down.t())
    exact = torch.zeros(m, n, dtype=torch.float64)
    slope = reference.activation_derivative(z.double(), activation)
    act = activated_bound(z.double(), exact, activation)
    factor = (up.double(), exact) if gated else (torch.ones_like(exact), exact)
    oracle, error = times(times(dh, (slope, ACTIVATION_UNITS * WIDE * (1 + slope.abs()))), factor)
    assert_within(dz, oracle, rounded(oracle, error, dtype))
    if gated:
        value, off = times(dh, act)
        assert_within(dup, value, rounded(value, off, dtype))
    if need_h:
        value, off = times(act, factor)
        assert_within(h, value, rounded(value, off, dtype))
    if bias:
        off = error.sum(0) + gamma(m + 1, WIDE) * (oracle.abs() + error).sum(0)
        assert_within(partial.sum(0), oracle.sum(0), off + 2 * WIDE * oracle.sum(0).abs())
    assert_written(m * n * (1 + gated + need_h) + blocks * n * bias, *buffers, dup_buffer, h_buffer, partial_buffer)


def check_activation_grad(seed: int, dtype: torch.dtype) -> None:
    """One random dz and bias gradient, against the derivative that autograd gives in fp64."""
    from tpmp_kernels.kernels.activation_grad import activation_grad

    draw = Draw(seed, dtype)
    m, n = draw.rng.choice(SIZES), draw.rng.choice(SIZES)
    activation = draw.rng.choice(list(reference.ACTIVATIONS))
    upstream = torch.float32 if draw.chance() else dtype
    dy, z = (draw.tensor(m, n).mul(3).to(upstream) for _ in range(2))
    dz, dbias = activation_grad(draw.poisoned(dy), z, activation, bias=True, dtype=dtype)

    oracle = dy.double() * reference.activation_derivative(z.double(), activation)
    rounding = ACTIVATION_UNITS * WIDE * dy.double().abs()  # act' itself, evaluated in fp32: it does not grow with z
    assert dz.dtype == dbias.dtype == dtype
    assert_within(dz, oracle, rounded(oracle, rounding, dtype))
    error = rounding.sum(0) + gamma(m + 1, WIDE) * oracle.abs().sum(0)
    assert_within(dbias, oracle.sum(0), rounded(oracle.sum(0), error, dtype))


def check_split_wgrad(dtype: torch.dtype) -> None:
    """Tokens in several parts, the last one shorter or empty: exact in integers, added to or written."""
    from tpmp_kernels.kernels import gemm
    from tpmp_kernels.kernels.wgrad import wgrad

    for tokens, n, k in ((1100, 40, 72), (1537, 3, 5)):
        dz, x = torch.randint(-1, 2, (tokens, n)).to(dtype), torch.randint(-1, 2, (tokens, k)).to(dtype)
        tile = gemm.choose("wgrad", dz.t(), x.t(), epilogue=tiles.Epilogue(residual=True))
        assert tiles.splits(n, k, tokens, tile, 132) > 1
        exact = dz.double().t() @ x.double()
        main_grad, buffer = poisoned_output(n, k, torch.float32)
        wgrad(dz, x, main_grad, add=False)
        assert torch.equal(main_grad.double(), exact)
        wgrad(dz, x, main_grad, add=True)
        assert torch.equal(main_grad.double(), 2 * exact)
        assert_written(n * k, buffer)


def check_integers(dtype: torch.dtype) -> None:
    """Sums of small integers are exact in any order: every bit must agree, whatever the tile."""
    from tpmp_kernels.kernels.linear import linear
    from tpmp_kernels.kernels.mlp import mlp_dz
    from tpmp_kernels.kernels.wgrad import wgrad

    for m, n, k in ((67, 72, 64), (1, 130, 31), (65, 1, 40)):
        x, weight = torch.randint(-1, 2, (m, k)).to(dtype), torch.randint(-1, 2, (n, k)).to(dtype)
        bias, residual = torch.randint(-3, 4, (n,)).to(dtype), torch.randint(-3, 4, (m, n)).to(dtype)
        y, z = linear(x, weight, bias, residual, "relu", store_preact=True)
        exact = x.double() @ weight.double().t() + bias.double()
        assert torch.equal(z.double(), exact)
        assert torch.equal(y.double(), exact.relu() + residual.double())
        # Wider than half precision holds: 2^11 times the residual.
        wide, _ = linear(x, weight, bias, residual.float() * 2048, out_dtype=torch.float32)
        assert torch.equal(wide.double(), exact + residual.double() * 2048)

        main_grad = torch.full((n, k), 2.0**20)
        dz = residual
        for microbatches in (1, 2):
            wgrad(dz, x, main_grad, add=True)
            assert torch.equal(main_grad.double(), 2.0**20 + microbatches * (dz.double().t() @ x.double()))
        wgrad(dz, x, main_grad, add=False)
        assert torch.equal(main_grad.double(), dz.double().t() @ x.double())

        grad, h, dbias = mlp_dz(x, weight.t(), residual, "relu", bias=True, need_h=True)
        oracle = (x.double() @ weight.double().t()) * (residual > 0)
        assert torch.equal(grad.double(), oracle) and torch.equal(h, residual.relu())
        assert torch.equal(dbias, oracle.sum(0).to(dtype))


def check_empty(dtype: torch.dtype) -> None:
    """No rows or no columns give an empty result; no inner dimension gives act(bias), or a gradient of zero."""
    from tpmp_kernels.kernels.gated_linear import gated_linear
    from tpmp_kernels.kernels.linear import linear
    from tpmp_kernels.kernels.mlp import mlp_dz
    from tpmp_kernels.kernels.wgrad import wgrad

    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=dtype)

    for m, n in ((0, 5), (5, 0), (0, 0)):
        y, z = linear(ones(m, 3), ones(n, 3), store_preact=True)
        assert y.shape == z.shape == (m, n)
        assert all(
            t.shape == (m, n) for t in gated_linear(ones(m, 3), ones(n, 3), ones(n, 3), "silu", store_preact=True)
        )
        dz, h, dbias = mlp_dz(ones(m, 3), ones(3, n), ones(m, n), "gelu", bias=True, need_h=True)
        assert dz.shape == h.shape == (m, n) and torch.equal(dbias, dbias.new_zeros(n))
    bias = torch.tensor([-1.0, 2.0], dtype=dtype)
    y, _ = linear(ones(3, 0), ones(2, 0), bias, None, "relu")
    assert torch.equal(y, bias.relu().expand(3, 2))
    main_grad = torch.ones(2, 3)
    wgrad(ones(0, 2), ones(0, 3), main_grad, add=True)
    assert torch.equal(main_grad, torch.ones(2, 3))
    wgrad(ones(0, 2), ones(0, 3), main_grad, add=False)
    assert torch.equal(main_grad, torch.zeros(2, 3))


def calls() -> list[tuple]:
    """(call, its inputs) of every op and form."""
    x, weight, other, down, bias = (
        torch.randn(s, requires_grad=True) for s in ((4, 16, 33), (48, 33), (48, 33), (31, 48), (48,))
    )
    drawn = [(lambda r, x, w, b, a=a: r.linear(x, w, b, activation=a), [x, weight, bias]) for a in ACTIVATIONS]
    drawn += [(lambda r, x, g, u, a=a: r.gated_linear(x, g, u, activation=a), [x, weight, other]) for a in GATES]
    drawn += [
        (lambda r, x, u, d, b, a=a: r.mlp(x, u, d, b, activation=a), [x, weight, down, bias])
        for a in reference.ACTIVATIONS
    ]
    drawn += [(lambda r, *t, a=a: r.gated_mlp(*t, activation=a), [x, weight, other, down]) for a in GATES]
    return drawn


@case
def op_gradients() -> None:
    """Every op with the Triton backend, forward and backward: no worse than twice torch."""
    torch.manual_seed(0)
    for call, inputs in calls():
        upstream = torch.randn_like(call(reference, *inputs))
        with ops.use_backend("triton"):
            got = with_gradients(call(ops, *inputs), inputs, upstream)
        eager = with_gradients(call(reference, *inputs), inputs, upstream)
        wide = [t.detach().double().requires_grad_() for t in inputs]
        oracle = with_gradients(call(reference, *wide), wide, upstream.double())
        for ours, theirs, exact in zip(got, eager, oracle, strict=True):
            assert_no_worse_than_torch(ours, theirs, exact, least=1)


def check_recompute(dtype: torch.dtype) -> None:
    """save_preact=False: the gradients of the saved form to the bit, on the tile of the saved form."""
    torch.manual_seed(1)
    x, weight, other, down, bias = (
        torch.randn(s).to(dtype).requires_grad_() for s in ((2, 9, 40), (72, 40), (72, 40), (31, 72), (72,))
    )
    forms = [
        (lambda s: ops.linear(x, weight, bias, activation="gelu", save_preact=s), [x, weight, bias]),
        (lambda s: ops.gated_linear(x, weight, other, save_preact=s), [x, weight, other]),
        (lambda s: ops.mlp(x, weight, down, bias, save_preact=s), [x, weight, down, bias]),
        (lambda s: ops.gated_mlp(x, weight, other, down, save_preact=s), [x, weight, other, down]),
    ]
    for call, inputs in forms:
        with ops.use_backend("triton"):
            saved, again = call(True), call(False)
            upstream = torch.randn_like(saved)
            pairs = zip(with_gradients(saved, inputs, upstream), with_gradients(again, inputs, upstream), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


def check_main_grad(dtype: torch.dtype) -> None:
    """Two microbatches of integers through every op into main_grads, zero_grad in between: exact, and anew."""
    torch.manual_seed(2)
    weight, down = (torch.nn.Parameter(torch.randint(-1, 2, s).to(dtype)) for s in ((48, 33), (33, 48)))
    exact = [torch.nn.Parameter(p.detach().double()) for p in (weight, down)]
    ops.attach_main_grad([weight, down])
    x = torch.randint(-1, 2, (7, 33)).to(dtype)
    upstream = torch.randint(-1, 2, (7, 33)).to(dtype)
    for _ in range(2):
        for parameter in (weight, down, *exact):
            parameter.grad = None
        for _ in range(2):
            version = weight.main_grad._version
            with ops.use_backend("triton"):
                ops.mlp(x, weight, down, activation="relu").backward(upstream)
            reference.mlp(x.double(), *exact, activation="relu").backward(upstream.double())
            assert weight.main_grad._version > version
        for ours, truth in zip((weight, down), exact, strict=True):
            assert torch.equal(ours.main_grad.double(), truth.grad)
            if dtype is torch.float32:
                assert ours.grad is ours.main_grad
            else:
                assert ours.grad is None
                ours.main_grad.zero_()


each_dtype("integers", check_integers, always=("bf16",))
each_dtype("split_wgrad", check_split_wgrad, always=("bf16",))
each_dtype("empty", check_empty)
each_dtype("recompute", check_recompute, always=("bf16",))
each_dtype("main_grad", check_main_grad, always=("bf16",))
random_cases("linear", check_linear, sample=4)
random_cases("gated_linear", check_gated_linear, sample=3)
random_cases("wgrad", check_wgrad, sample=3)
random_cases("mlp_dz", check_mlp_dz, sample=3)
random_cases("activation_grad", check_activation_grad, sample=3)
