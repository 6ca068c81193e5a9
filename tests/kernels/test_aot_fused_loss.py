"""kernels.linear_cross_entropy compiled ahead of time: no logits are stored, and nothing spills where they are used."""

import pytest
import torch

from tpmp_kernels.kernels import tiles

pytest.importorskip("triton")

from aot_checks import assert_no_spill
from aot_gemm import ALIGNED, ARCHES, DTYPES, TOKENS, cases, check, empty, sampled

from tpmp_kernels.kernels import aot
from tpmp_kernels.kernels import linear_cross_entropy as kernel

EPILOGUES = [tiles.Epilogue(cap, residual=smooth) for cap in (None, "softcap") for smooth in (False, True)]
# Nothing and everything.
FEW = [EPILOGUES[0], EPILOGUES[-1]]
STATISTICS, GRADIENT = "statistics", "d"
# The first id is an argument of 64 bits where it needs them.
FIRST = {ALIGNED: 4096}


def grid(operation: str, form: str) -> list:
    """Without a row for each parity of n: d has a pitch of its own, and statistics no row of n elements."""
    return [c for c in cases(operation, EPILOGUES, FEW, lambda n, k: k == ALIGNED, form) if c.n == c.k]


GRID = grid("logits", STATISTICS) + grid("logits_d", GRADIENT)
SAMPLE = [sampled([c for c in GRID if c.form == form], FEW[1:], 0)[0] for form in (STATISTICS, GRADIENT)]


def check_fused_loss(case) -> None:
    dtype, m, n, k, tile = DTYPES[case.dtype], TOKENS, case.n, case.k, case.tile
    x, weight, target = empty(m, k, dtype=dtype), empty(n, k, dtype=dtype), empty(m, dtype=torch.int64)
    softcap, smooth, first = case.epilogue.activation and 30.0, case.epilogue.residual, FIRST.get(n, 2**31 + 5)
    if case.form == STATISTICS:
        parts = empty(-(-n // tile.block_n), 4, m, dtype=torch.float32)
        named = kernel.statistics_arguments(x, weight, target, parts, first, softcap, smooth, tile)
        check(kernel.logits_statistics_kernel, named, case)
        return
    row, d = empty(m, dtype=torch.float32), empty(m, -(-n // kernel.PITCH) * kernel.PITCH, dtype=dtype)
    rows = row, row, row, row, row if smooth else None
    named = kernel.gradient_arguments(x, weight, d, target, first, *rows, softcap, tile)
    check(kernel.logits_gradient_kernel, named, case)


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_aot_fused_loss(case):
    check_fused_loss(case)


@pytest.mark.full
@pytest.mark.parametrize("case", [c for c in GRID if c not in SAMPLE], ids=str)
def test_aot_fused_loss_full(case):
    check_fused_loss(case)


@pytest.mark.full
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("shortfall", [False, True])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_aot_fused_loss_combined(arch, shortfall, width):
    n, tile = 128256, SAMPLE[0].tile
    parts, found = (empty(*each, 4, TOKENS, dtype=torch.float32) for each in ((-(-n // width),), ()))
    named = kernel.combine_arguments(parts, found, n, shortfall, tile) | {"WIDTH": width}
    assert_no_spill(aot.compile(kernel.combine_kernel, named, arch=arch, num_warps=4, num_stages=3))
