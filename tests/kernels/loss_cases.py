"""The kernels of the losses in the interpreter: pieces of logits surrounded by NaN, and the ops that stand on them."""

from unittest import mock

import torch
from bounds import UNIT, assert_no_worse_than_torch, assert_within
from interpreter import UNIT_HERE, case, each_dtype, poisoned, poisoned_output, random_cases, with_gradients
from loss_bounds import gradient_bound, statistics_bounds
from loss_shards import on_each_rank
from neighbour_cases import FLOAT, Draw, assert_written, within

from tpmp_kernels import ops, reference
from tpmp_kernels.ops import vocab_products, vocab_slices

# As shipped, and blocks that go through few columns in several steps.
BLOCKS = [None, (4, 16), (8, 16)]


def piece(d: Draw) -> tuple[torch.Tensor, torch.Tensor, int, float | None, tuple[int, int] | None]:
    """(logits, targets in the piece, beside it and ignored, the piece's first id, cap, block)."""
    m, n, first, block = d.size(), d.size(), d.rng.choice([0, 1000, 2**31 + 5]), d.rng.choice(BLOCKS)
    m = m if block is None else min(m, 9)
    z = d.normal(m, n, scale=d.rng.choice([1.0, 30.0]))
    target = torch.randint(-2, n + 2, (m,), generator=d.generator) + first
    return z, target.where(torch.rand(m, generator=d.generator) < 0.8, -100), first, d.rng.choice([None, 5.0]), block


def blocked(named: dict, block: tuple[int, int] | None) -> dict:
    return named if block is None else {**named, "BLOCK_M": block[0], "BLOCK_N": block[1]}


def check_loss_statistics(seed: int, dtype: torch.dtype) -> None:
    from tpmp_kernels.kernels import cross_entropy as kernel

    d = Draw(seed, dtype)
    z, target, first, softcap, block = piece(d)
    (m, n), smooth = z.shape, d.chance()
    found, buffer = poisoned_output(4, m, FLOAT)
    named = kernel.statistics_arguments(poisoned(d.rng, z), target, found, first, softcap, smooth)
    named = blocked(named, block)
    with within(named):
        kernel.statistics_kernel[(-(-m // named["BLOCK_M"]),)](**named)
    bounds = statistics_bounds(z, target, first, softcap, steps=-(-n // named["BLOCK_N"]))
    for got, (oracle, bound) in zip(found, bounds if smooth else bounds[:3], strict=smooth):
        assert_within(got, oracle, bound)
    assert smooth or not found[3].any()
    assert_written([buffer], 4 * m)


def check_loss_gradient(seed: int, dtype: torch.dtype) -> None:
    """From fp32 logits into dtype, from dtype into itself, and over the logits."""
    from tpmp_kernels.kernels import cross_entropy as kernel

    d = Draw(seed, dtype)
    z, target, first, softcap, block = piece(d)
    (m, n), over = z.shape, d.chance()
    z = z if over or d.chance() else z.float()
    peak = reference_peak(z, softcap)
    scale, target_scale, truth, shift = (torch.randn(m, generator=d.generator) for _ in range(4))
    rows = [peak, scale, target_scale, truth, d.maybe(shift)]
    inside = poisoned(d.rng, z)
    out, buffer = (inside, None) if over else poisoned_output(m, n, dtype)
    named = blocked(kernel.gradient_arguments(inside, out, target, first, *rows, softcap), block)
    with within(named):
        kernel.gradient_kernel[(-(-m // named["BLOCK_M"]), -(-n // named["BLOCK_N"]))](**named)
    oracle, bound = gradient_bound(z, target, first, *rows, softcap, unit=UNIT_HERE[dtype], dtype=dtype)
    assert_within(out, oracle, bound)
    if buffer is not None:
        assert_written([buffer], m * n)


def reference_peak(z: torch.Tensor, softcap: float | None) -> torch.Tensor:
    z = z.float()
    return (z if softcap is None else softcap * (z / softcap).tanh()).amax(1)


def check_loss_empty(dtype: torch.dtype) -> None:
    """No rows, and in a gradient no columns."""
    from tpmp_kernels.kernels import cross_entropy as kernel

    for m, n in ((0, 5), (3, 0)):
        z, row, target = torch.ones(m, n, dtype=dtype), torch.ones(m), torch.ones(m, dtype=torch.int64)
        kernel.gradient(z, z, target, 0, row, row, row, row, None, softcap=2.0)
        if m == 0:
            assert kernel.statistics(z, target, 0, None, shortfall=True).shape == (4, 0)


@case
def loss_of_extreme_logits() -> None:
    """-inf alone in a row, beside numbers, and of the target; 1e4 beside -1e4; a nan stays one."""
    from tpmp_kernels.kernels import cross_entropy as kernel

    low, inf, lowest = -1e4, float("inf"), torch.finfo(FLOAT).min
    z = torch.tensor([[-inf] * 3, [1.0, -inf, 1.0], [-low, low, low], [low, low, low], [0.0, float("nan"), 0.0]])
    target = torch.tensor([7, 1, 0, 2, 0])
    peak, others, target_logit, shortfall = kernel.statistics(z, target, 0, None, shortfall=True)
    assert peak[:4].tolist() == [lowest, 1.0, -low, low]
    assert others.isnan().tolist() == [False] * 4 + [True] and others[:4].tolist() == [0.0, 2.0, 0.0, 2.0]
    assert target_logit[:4].tolist() == [0.0, -inf, -low, low]
    assert shortfall[:4].tolist() == [inf, inf, 4e4, 0.0]
    one = torch.ones(5)
    out = torch.empty(5, 3)
    kernel.gradient(z, out, target, 0, peak, one, one, one, None, softcap=None)
    expected = [[0.0] * 3, [1.0, -1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0]]
    assert out[:4].tolist() == expected and out[4].isnan().any()


@case
def loss_launches_of_several_blocks() -> None:
    """5 rows and 1030 columns: the second block of each is smaller than the shipped ones, and has the peak of some."""
    from tpmp_kernels.kernels import cross_entropy as kernel

    generator = torch.Generator().manual_seed(1)
    z, target = torch.randn(5, 1030, generator=generator), torch.tensor([0, 1029, 1024, 1023, 7])
    z[::2, 1024:] += 5
    found = kernel.statistics(z, target, 0, None, shortfall=True)
    for got, (oracle, bound) in zip(found, statistics_bounds(z, target, 0, None, steps=2), strict=True):
        assert_within(got, oracle, bound)
    rows, out = [found[0], *torch.randn(4, 5, generator=generator)], torch.full_like(z, torch.nan)
    kernel.gradient(z, out, target, 0, *rows, softcap=None)
    oracle, bound = gradient_bound(z, target, 0, *rows, None, unit=UNIT[z.dtype], dtype=z.dtype)
    assert_within(out, oracle, bound)


@case
def loss_offsets_past_two_to_the_31() -> None:
    """Rows, then columns, 2^30 elements apart, in memory of which nothing else is touched."""
    from tpmp_kernels.kernels import cross_entropy as kernel

    far, values = 2**30 + 8, torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.0, -0.5], [-2.0, 1.0, 3.0]], dtype=torch.float16)
    memory, target = torch.empty(2 * far + 3, dtype=torch.float16), torch.tensor([2, 0, 1])
    for strides in ((far, 1), (1, far)):
        z = memory.as_strided((3, 3), strides).copy_(values)
        found = torch.empty(4, 3)
        named = kernel.statistics_arguments(z, target, found, 0, None, True)
        with within(named):
            kernel.statistics_kernel[(1,)](**named)
        for got, (oracle, bound) in zip(found, statistics_bounds(values, target, 0, None, steps=1), strict=True):
            assert_within(got, oracle, bound)
        rows = [found[0], *torch.rand(4, 3, generator=torch.Generator().manual_seed(1))]
        named = kernel.gradient_arguments(z, z, target, 0, *rows, None)
        with within(named):
            kernel.gradient_kernel[(1, 1)](**named)
        oracle, bound = gradient_bound(values, target, 0, *rows, None, unit=UNIT[z.dtype], dtype=z.dtype)
        assert_within(z, oracle, bound)


TOKENS, CLASSES, WIDTH = 9, 40, 16
# (first id, rows) of three ranks; rows from CLASSES on are padding.
LAYOUTS = [[(0, 17), (17, 1), (18, 30)], [(23, 17), (0, 22), (22, 1)], [(0, 40), (40, 3), (43, 0)]]
FORMS = [{}, {"grad_scale": 0.75}, None]  # of linear_cross_entropy, and None: cross_entropy


def check_loss_shards(seed: int, dtype: torch.dtype) -> None:
    """Over three uneven parts, NaN as padding, loss and gradients are those of the whole."""
    d = Draw(seed, dtype)
    layout, form = d.rng.choice(LAYOUTS), d.rng.choice(FORMS)
    reductions = ["mean", "sum"] if form else ["mean", "sum", "none"]
    options = {
        "label_smoothing": d.rng.choice([0.0, 0.2]), "z_loss": d.rng.choice([0.0, 0.01]),
        "softcap": d.rng.choice([None, 3.0]), "ignore_index": d.rng.choice([-100, 17]),
        "reduction": d.rng.choice(reductions),
    }  # fmt: skip
    upstream = torch.randn(TOKENS, generator=d.generator) if options["reduction"] == "none" else torch.tensor(0.75)
    target = torch.tensor([0, 39, 16, 18, 22, 23, 30, 21, 5]).repeat_interleave(2)[::2]
    target[d.rng.randrange(TOKENS)] = options["ignore_index"]
    with (
        ops.use_backend("triton"),
        mock.patch.object(vocab_products, "_SLICES", {"cpu": (1, 32, 32)}),
        mock.patch.object(vocab_slices, "_LIMITS", {"cpu": (TOKENS, TOKENS)}),
    ):
        if form is None:
            check_logits_in_shards(d.normal(CLASSES, TOKENS, scale=2.0), layout, target, upstream, options)
        else:
            x, weight = d.normal(TOKENS, WIDTH), d.normal(CLASSES, WIDTH)
            check_features_in_shards(x, weight, layout, target, upstream, options, form)


def part(t: torch.Tensor, start: int, rows: int) -> torch.Tensor:
    """Rows start .. start + rows of t [CLASSES, *], NaN beyond its end."""
    return torch.nn.functional.pad(t, (0, 0, 0, rows), value=torch.nan)[start : start + rows].contiguous()


def place(layout: list[tuple[int, int]], group) -> dict:
    return {"group": group, "vocab_start": layout[group.rank][0], "vocab_size": CLASSES}


def check_logits_in_shards(z: torch.Tensor, layout, target, upstream, options: dict) -> None:
    """z [CLASSES, TOKENS]; a rank's logits are columns of it."""

    def run(group):
        own = part(z, *layout[group.rank]).t().requires_grad_()
        return with_gradients(ops.cross_entropy(own, target, **place(layout, group), **options), [own], upstream)

    wide = z.t().double().requires_grad_()
    loss, d = with_gradients(reference.cross_entropy(wide, target, **options), [wide], upstream.double())
    error = (UNIT_HERE[z.dtype] + 1e-5) * d.abs() + 1e-6
    for (start, rows), (own_loss, own) in zip(layout, on_each_rank(len(layout), run), strict=True):
        assert_within(own_loss, loss, 1e-5 * (1 + loss.abs()))
        here = slice(start, min(start + rows, CLASSES))
        assert_within(own[:, : max(0, CLASSES - start)], d[:, here], error[:, here])
        assert not own[:, max(0, CLASSES - start) :].any()


def check_features_in_shards(x: torch.Tensor, weight: torch.Tensor, layout, target, upstream, options, form) -> None:
    """dx is the sum of the ranks' parts; d is rounded to the dtype once, and each part and dW once more."""

    def run(group):
        leaves = [x.clone().requires_grad_(), part(weight, *layout[group.rank]).requires_grad_()]
        where = place(layout, group) | {"partial_dx": True}
        return with_gradients(ops.linear_cross_entropy(*leaves, target, **where, **options, **form), leaves, upstream)

    features, rows = x.double(), weight.double()
    z = (features @ rows.t()).requires_grad_()
    loss, d = with_gradients(reference.cross_entropy(z, target, **options), [z], upstream.double())
    unit, wide, results = UNIT_HERE[x.dtype], 1e-5, on_each_rank(len(layout), run)
    parts = torch.stack([dx.double() for _, dx, _ in results])
    error = (unit + wide) * (d.abs() @ rows.abs()) + unit * parts.abs().sum(0) + wide
    assert_within(parts.sum(0), d @ rows, error)
    dweight, error = d.t() @ features, (2 * unit + wide) * (d.t().abs() @ features.abs()) + wide
    for (start, count), (own_loss, _, own) in zip(layout, results, strict=True):
        assert_within(own_loss, loss, 1e-5 * (1 + loss.abs()))
        here = slice(start, min(start + count, CLASSES))
        assert_within(own[: max(0, CLASSES - start)], dweight[here], error[here])
        assert not own[max(0, CLASSES - start) :].any()


@case
def loss_gradients() -> None:
    """The ops with the Triton backend on slices and chunks: no worse than twice torch, and in bf16 a confident d."""
    torch.manual_seed(0)
    x, weight = torch.randn(9, 16, requires_grad=True), torch.randn(45, 16, requires_grad=True)
    z, target = torch.randn(9, 45, requires_grad=True), torch.randint(40, (9,))
    target[3] = -100
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 3.0, "vocab_size": 40}
    with (
        mock.patch.object(vocab_products, "_SLICES", {"cpu": (1, 32, 32)}),
        mock.patch.object(vocab_slices, "_LIMITS", {"cpu": (5, 5)}),
    ):
        for call, inputs in (
            (lambda r, z: r.cross_entropy(z, target, **options), [z]),
            (lambda r, x, w: r.linear_cross_entropy(x, w, target, **options), [x, weight]),
            (lambda r, x, w: r.linear_cross_entropy(x, w, target, grad_scale=1.0, **options), [x, weight]),
        ):
            with ops.use_backend("triton"):
                got = with_gradients(call(ops, *inputs), inputs, torch.ones(()))
            eager = with_gradients(call(reference, *inputs), inputs, torch.ones(()))
            wide = [t.detach().double().requires_grad_() for t in inputs]
            oracle = with_gradients(call(reference, *wide), wide, torch.ones(()).double())
            for ours, theirs, exact in zip(got, eager, oracle, strict=True):
                assert_no_worse_than_torch(ours, theirs, exact, least=10)


@case
def loss_main_grad() -> None:
    """Two microbatches of two chunks each in bf16: their sum in fp32, in either form."""
    dtype, total, size = torch.bfloat16, torch.zeros(20, 16).double(), torch.zeros(20, 16).double()
    generator = torch.Generator().manual_seed(2)
    weight, target = torch.randn(20, 16, generator=generator).to(dtype), torch.arange(6) * 3
    parameters = [torch.nn.Parameter(weight) for _ in range(2)]
    ops.attach_main_grad(parameters)
    with (
        ops.use_backend("triton"),
        mock.patch.object(vocab_products, "_SLICES", {"cpu": (1, 32, 32)}),
        mock.patch.object(vocab_slices, "_LIMITS", {"cpu": (5, 5)}),
    ):
        for _ in range(2):
            x = torch.randn(6, 16, generator=generator).to(dtype)
            for parameter, how in zip(parameters, ({}, {"grad_scale": 1.0}), strict=True):
                ops.linear_cross_entropy(x, parameter, target, reduction="sum", **how).backward()
            d = (x.double() @ weight.double().t()).softmax(1) - torch.nn.functional.one_hot(target, 20)
            total, size = total + d.t() @ x.double(), size + d.t().abs() @ x.double().abs()
    for parameter in parameters:
        assert_within(parameter.main_grad, total, (UNIT_HERE[dtype] + 1e-5) * size)


def check_confident(dtype: torch.dtype) -> None:
    """p within 1e-4 .. 1e-9 of 1, in slices: d of the target has the digits of its dtype; test_losses_precision."""
    z, target = (torch.randn(6, 40, generator=torch.Generator().manual_seed(1)) / 2).to(dtype), torch.arange(6) * 7
    z[torch.arange(6), target] = torch.linspace(14, 24, 6).to(dtype)
    behind = z.double().scatter(1, target[:, None], -torch.inf).logsumexp(1) - z.double()[torch.arange(6), target]
    with ops.use_backend("triton"), mock.patch.object(vocab_products, "_SLICES", {"cpu": (1, 32, 32)}):
        logits, x = z.clone().requires_grad_(), z.clone().requires_grad_()
        loss = ops.cross_entropy(logits, target, reduction="sum")
        of_x = ops.linear_cross_entropy(x, torch.eye(40, dtype=dtype), target, reduction="sum")
        (8192 * (loss + of_x)).backward()
    missing = behind.sigmoid()
    for d in (logits.grad, x.grad):
        error = (d.double()[torch.arange(6), target] / 8192 + missing).abs()
        assert (error <= (UNIT_HERE[dtype] + 1e-5) * missing + 1e-11).all(), error / missing
    assert (loss.double() - torch.nn.functional.softplus(behind).sum()).abs() <= 1e-5 * loss


each_dtype("loss_empty", check_loss_empty)
each_dtype("loss_confident", check_confident)
random_cases("loss_statistics", check_loss_statistics, sample=3)
random_cases("loss_gradient", check_loss_gradient, sample=2)
random_cases("loss_shards", check_loss_shards, sample=2)
