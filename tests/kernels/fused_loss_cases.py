"""The kernels that make statistics and d of a product in its epilogue, in the interpreter: no logits are stored."""

from unittest import mock

import torch
from bounds import assert_within
from interpreter import UNIT_HERE, case, each_dtype, only_within, poisoned_output, random_cases
from linear_cases import Draw, launch_within, product_bound
from loss_bounds import gradient_bound, statistics_bounds
from neighbour_cases import FLOAT, assert_written

from tpmp_kernels.kernels import tiles
from tpmp_kernels.ops import vocab

FIRSTS = (0, 1000, 2**31 + 5)


class Problem:
    """x [M, K], weight [N, K], targets among their products, beside them and ignored; the first id, the cap.

    Products of small integers are exact, and are then not `off`: nothing hides the error of the epilogue.
    """

    def __init__(self, d: Draw):
        m, n, k = d.sizes()
        self.x, self.weight = d.tensor(m, k), d.tensor(n, k).mul(d.rng.choice([0.3, 3.0]))
        exact = d.chance()
        if exact:
            self.x, self.weight = (t.sign() for t in (self.x, self.weight))
        self.first, self.softcap, self.smooth = d.rng.choice(FIRSTS), d.rng.choice([None, 5.0]), d.chance()
        target = torch.randint(-2, n + 2, (m,), generator=d.generator) + self.first
        self.target = target.where(torch.rand(m, generator=d.generator) < 0.8, -100)
        self.inside = d.poisoned(self.x), d.poisoned(self.weight)
        self.z, off = product_bound(self.x, self.weight)
        self.off = torch.zeros_like(off) if exact else off

    def tile(self, d: Draw, operation: str) -> tiles.Tile:
        from tpmp_kernels.kernels.linear_cross_entropy import epilogue

        return d.tile(operation, epilogue(self.softcap, self.smooth), *self.inside)


def check_fused_loss_statistics(seed: int, dtype: torch.dtype) -> None:
    """The statistics of each tile beside NaN, and merged, a few tiles at a time."""
    from tpmp_kernels.kernels import linear_cross_entropy as kernel

    d = Draw(seed, dtype)
    p = Problem(d)
    tile, (m, n) = p.tile(d, "logits"), p.z.shape
    blocks = -(-n // tile.block_n)
    parts, buffer = poisoned_output(4 * blocks, m, FLOAT)
    parts = parts.view(blocks, 4, m)
    launch_within(
        kernel.logits_statistics_kernel,
        kernel.statistics_arguments(*p.inside, p.target, parts, p.first, p.softcap, p.smooth, tile), tile,
    )  # fmt: skip
    assert_written([buffer], parts.numel())
    found = merged(parts, n, p.smooth, tile, d.rng.choice([kernel.COMBINE_BLOCK, (16, 2)]))
    check_statistics(p, found, min(tile.part, tile.block_n))


def merged(parts: torch.Tensor, n: int, shortfall: bool, tile: tiles.Tile, block: tuple[int, int]) -> torch.Tensor:
    """found [4, M], by a combine_kernel that takes a `block` of rows and column blocks at a time."""
    from tpmp_kernels.kernels import linear_cross_entropy as kernel

    m = parts.shape[2]
    found, buffer = poisoned_output(4, m, FLOAT)
    named = kernel.combine_arguments(parts, found, n, shortfall, tile) | {"BLOCK_M": block[0], "BLOCK_N": block[1]}
    with only_within([parts, found]):
        kernel.combine_kernel[(-(-m // block[0]),)](**named)
    assert_written([buffer], 4 * m)
    return found


def check_statistics(p: Problem, found: torch.Tensor, part: int) -> None:
    steps = 2 * -(-p.z.shape[1] // part)  # one for each part of a tile, and no more than that for merging the tiles
    bounds = statistics_bounds(p.z, p.target, p.first, p.softcap, steps=steps, off=p.off)
    for got, (oracle, bound) in zip(found, bounds if p.smooth else bounds[:3], strict=p.smooth):
        assert_within(got, oracle, bound)
    assert p.smooth or not found[3].any()


def check_fused_loss_combined(seed: int, dtype: torch.dtype) -> None:
    """Statistics of many narrow blocks, in several steps; those of a block are kernels.cross_entropy's."""
    from tpmp_kernels.kernels import cross_entropy

    d = Draw(seed, dtype)
    p, width = Problem(d), d.rng.choice([1, 4, 16])
    z, n = p.z.float(), p.z.shape[1]
    p.z, p.off = z, None
    pieces = [slice(left, min(left + width, n)) for left in range(0, n, width)]
    parts = [
        cross_entropy.statistics(z[:, piece], p.target, p.first + piece.start, p.softcap, shortfall=p.smooth)
        for piece in pieces
    ]
    tile = tiles.Tile(64, width, 64, 8, 4, 1, width, "scalars")
    check_statistics(p, merged(torch.stack(parts), n, p.smooth, tile, d.rng.choice([(16, 2), (64, 8)])), width)


def check_fused_loss_gradient(seed: int, dtype: torch.dtype) -> None:
    """d of each logit, past the last class up to the pitch any number, and beyond that nothing."""
    from tpmp_kernels.kernels import linear_cross_entropy as kernel

    d = Draw(seed, dtype)
    p = Problem(d)
    tile, (m, n) = p.tile(d, "logits_d"), p.z.shape
    peak = (p.z if p.softcap is None else p.softcap * (p.z / p.softcap).tanh()).amax(1).float()
    scale, target_scale, truth, shift = (torch.randn(m, generator=d.generator) for _ in range(4))
    rows = [peak, scale, target_scale, truth, shift if p.smooth else None]
    out, buffer = poisoned_output(m, -(-n // kernel.PITCH) * kernel.PITCH, dtype)
    named = kernel.gradient_arguments(*p.inside, out, p.target, p.first, *rows, p.softcap, tile)
    launch_within(kernel.logits_gradient_kernel, named, tile)

    check_gradient(p, out[:, :n], rows)
    assert_written([buffer], out.numel())


def check_gradient(p: Problem, got: torch.Tensor, rows: list[torch.Tensor | None]) -> None:
    how = {"unit": UNIT_HERE[got.dtype], "dtype": got.dtype, "off": p.off}
    oracle, bound = gradient_bound(p.z, p.target, p.first, *rows, p.softcap, **how)
    assert_within(got, oracle, bound)


def check_fused_loss_launches(dtype: torch.dtype) -> None:
    """As the ops call them, on one multiprocessor and on many: within the bounds on the tile of each."""
    from tpmp_kernels.kernels import gemm
    from tpmp_kernels.kernels import linear_cross_entropy as kernel

    d = Draw(3, dtype)
    for sms in (1, 132):
        p = Problem(d)
        p.softcap, p.smooth = None, True
        rows = [p.z.amax(1).float(), *torch.randn(3, len(p.z), generator=d.generator), None]
        with mock.patch.object(gemm, "chip", lambda _, n=sms: ("sm90", n)):
            found = kernel.statistics(*p.inside, p.target, p.first, None, shortfall=True)
            dz = kernel.gradient(*p.inside, p.target, p.first, *rows, softcap=None)
        check_statistics(p, found, part=1)
        check_gradient(p, dz, rows)
        assert dz.dtype is dtype and dz.stride(0) % kernel.PITCH == 0


@case
def fused_loss_on_any_number_of_multiprocessors() -> None:
    """The same bits, whichever program makes a tile."""
    from tpmp_kernels.kernels import gemm
    from tpmp_kernels.kernels import linear_cross_entropy as kernel

    d, tile = Draw(1, torch.float16), tiles.Tile(64, 64, 32, 2, 4, 1, 32, "scalars", True, True)
    x, weight, target = d.tensor(130, 40), d.tensor(300, 40), torch.arange(130) * 2
    results = []
    for sms in (1, 4):
        parts, dz = torch.empty(5, 4, 130), torch.empty(130, 304, dtype=torch.float16)
        rows = [torch.ones(130)] * 4
        with mock.patch.object(gemm, "chip", lambda _, n=sms: ("", n)):
            for launched, named in (
                (
                    kernel.logits_statistics_kernel,
                    kernel.statistics_arguments(x, weight, target, parts, 0, None, True, tile),
                ),
                (
                    kernel.logits_gradient_kernel,
                    kernel.gradient_arguments(x, weight, dz, target, 0, *rows, None, None, tile),
                ),
            ):
                gemm.launch(launched, named, tile, x.device)
        results.append((merged(parts, 300, True, tile, kernel.COMBINE_BLOCK), dz))
    for found, dz in results[1:]:
        assert torch.equal(found, results[0][0]) and torch.equal(dz, results[0][1])


@case
def fused_loss_of_targets_at_the_edges_of_tiles() -> None:
    """The only target of its tile in the first or the last column of it."""
    from tpmp_kernels.kernels import linear_cross_entropy as kernel

    d = Draw(4, torch.float16)
    p = Problem(d)
    p.x, p.weight, p.softcap, p.smooth = d.tensor(1, 8), d.tensor(200, 8), None, True
    p.z, p.off = product_bound(p.x, p.weight)
    rows = [p.z.amax(1).float(), *torch.randn(3, 1, generator=d.generator), None]
    for column in (0, 63, 64, 127, 128, 199):
        p.target = torch.tensor([p.first + column])
        check_statistics(p, kernel.statistics(p.x, p.weight, p.target, p.first, None, shortfall=True), part=1)
        check_gradient(p, kernel.gradient(p.x, p.weight, p.target, p.first, *rows, softcap=None), rows)


@case
def fused_loss_of_two_products() -> None:
    """A vocabulary in two pieces, the peak of some rows in the first and of others in the second."""
    d = Draw(5, torch.float32)
    p = Problem(d)
    p.x, p.weight, p.softcap, p.smooth, p.first = d.tensor(9, 8), d.tensor(100, 8), None, True, 0
    p.target = torch.arange(9) * 11
    p.z, p.off = product_bound(p.x, p.weight)
    loss = vocab.Loss(0, 0, 100, label_smoothing=0.1, z_loss=0.0, softcap=None, ignore_index=-100, reduction="none")
    statistics = vocab.Statistics(p.target, FLOAT, loss)
    for piece in (slice(0, 30), slice(30, 100)):
        statistics.add_product(p.x, p.weight[piece], piece.start)
    assert len({bool(left) for left in p.z[:, :30].amax(1) > p.z[:, 30:].amax(1)}) == 2
    check_statistics(p, statistics.local(), part=1)


@case
def fused_loss_of_extreme_logits() -> None:
    """-inf alone in rows of several tiles, 1e4 beside -1e4, and a nan, which stays one."""
    from tpmp_kernels.kernels import linear_cross_entropy as kernel

    inf, lowest, n = float("inf"), torch.finfo(FLOAT).min, 130
    x, weight = torch.tensor([[-inf], [1e4], [-1e4], [float("nan")]]), torch.ones(n, 1)
    weight[1::2] = 0.5
    peak, others, target_logit, shortfall = kernel.statistics(
        x, weight, torch.tensor([7, 1, 2, 0]), 0, None, shortfall=True
    )
    assert peak[:3].tolist() == [lowest, 1e4, -5e3]
    assert others.isnan().tolist() == [False] * 3 + [True] and others[:3].tolist() == [0.0, 65.0, 65.0]
    assert target_logit[:3].tolist() == [-inf, 5e3, -1e4]
    assert shortfall[:3].tolist() == [inf, 65 * 5e3, 65 * 5e3]
    one = torch.ones(4)
    d = kernel.gradient(x, weight, torch.tensor([7, 1, 2, 0]), 0, peak, one, one, one, None, softcap=None)
    assert d[0].tolist() == [-1.0 * (i == 7) for i in range(n)]
    assert d[1].tolist() == [1.0, -1.0] + [1.0, 0.0] * 64 and d[3].isnan().all()


@case
def fused_loss_offsets_past_two_to_the_31() -> None:
    """Rows of d 2^30 elements apart, in memory of which nothing else is touched."""
    from tpmp_kernels.kernels import linear_cross_entropy as kernel

    dtype, far = torch.float16, 2**30 + 16
    d, tile = Draw(2, dtype), tiles.Tile(64, 64, 32, 8, 4, 1, 64, "scalars")
    p = Problem(d)
    p.x, p.weight, p.target, p.softcap, p.smooth = (
        d.tensor(3, 8),
        d.tensor(64, 8),
        torch.tensor([2, 0, 63]),
        None,
        False,
    )
    p.first, (p.z, p.off) = 0, product_bound(p.x, p.weight)
    rows = [p.z.amax(1).float(), *torch.rand(3, 3, generator=d.generator), None]
    out = torch.empty(2 * far + 64, dtype=dtype).as_strided((3, 64), (far, 1))
    named = kernel.gradient_arguments(p.x, p.weight, torch.empty(3, 64, dtype=dtype), p.target, 0, *rows, None, tile)
    launch_within(kernel.logits_gradient_kernel, named | {"d": out, "d_columns": far}, tile)
    check_gradient(p, out, rows)


def check_fused_loss_empty(dtype: torch.dtype) -> None:
    """No rows, no columns, no features."""
    from tpmp_kernels.kernels import linear_cross_entropy as kernel

    for m, n, k in ((0, 5, 3), (2, 0, 3), (0, 0, 0), (2, 3, 0)):
        x, weight, target = torch.ones(m, k, dtype=dtype), torch.ones(n, k, dtype=dtype), torch.zeros(m).long()
        found = kernel.statistics(x, weight, target, 0, 2.0, shortfall=True)
        assert found.shape == (4, m)
        row = torch.ones(m)
        d = kernel.gradient(x, weight, target, 0, row - 1, row, row, row, None, softcap=2.0)
        assert d.shape == (m, n)
        if n == 0:
            assert found[:, :m].tolist() == [[torch.finfo(FLOAT).min] * m, *[[0.0] * m] * 3]
        elif m > 0:
            assert found.tolist() == [[0.0] * m, [n - 1.0] * m, [0.0] * m, [0.0] * m]
            assert d.tolist() == [[0.0, 1.0, 1.0]] * m


each_dtype("fused_loss_empty", check_fused_loss_empty)
each_dtype("fused_loss_launches", check_fused_loss_launches)
random_cases("fused_loss_statistics", check_fused_loss_statistics, sample=4)
random_cases("fused_loss_combined", check_fused_loss_combined, sample=8)
random_cases("fused_loss_gradient", check_fused_loss_gradient, sample=4)
