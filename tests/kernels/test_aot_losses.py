"""The kernels of the losses compiled ahead of time for sm_90: nothing spills. Their products are in the GEMM tests."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from aot_checks import assert_no_spill
from aot_gemm import DTYPES, TOKENS, empty

from tpmp_kernels.kernels import aot, cross_entropy

SIZES = (16384, 4099)
FIRST = {"first 32 bits": 4096, "first 64 bits": 2**31 + 5}
ROWS, COLUMNS = "rows", "columns"  # which of them are adjacent in memory


def logits(dtype: str, n: int, adjacent: str) -> torch.Tensor:
    return empty(TOKENS, n, dtype=DTYPES[dtype]) if adjacent == COLUMNS else empty(n, TOKENS, dtype=DTYPES[dtype]).t()


def build(kernel, named: dict) -> aot.Compiled:
    return aot.compile(kernel, named, arch="sm90", num_warps=cross_entropy.WARPS, num_stages=3)


def name(case: tuple) -> str:
    return "-".join(map(str, case))


def marked(grid: list[tuple], always: list[tuple]) -> list:
    return [pytest.param(*c, marks=[pytest.mark.full] * (c not in always), id=name(c)) for c in grid]


STATISTICS = list(itertools.product(DTYPES, SIZES, (None, 30.0), (False, True), (COLUMNS, ROWS), FIRST))


@pytest.mark.parametrize(
    ("dtype", "n", "softcap", "shortfall", "adjacent", "first"),
    marked(STATISTICS, [("fp32", 4099, 30.0, True, COLUMNS, "first 64 bits")]),
)
def test_aot_loss_statistics(dtype, n, softcap, shortfall, adjacent, first):
    z, target = logits(dtype, n, adjacent), empty(TOKENS, dtype=torch.int64)
    found = empty(4, TOKENS, dtype=torch.float32)
    named = cross_entropy.statistics_arguments(z, target, found, FIRST[first], softcap, shortfall)
    assert_no_spill(build(cross_entropy.statistics_kernel, named))


# fp32 logits of a product become d in the dtype of the next; given logits keep theirs.
PAIRS = [("fp32", "fp32"), ("fp32", "bf16"), ("fp32", "fp16"), ("bf16", "bf16"), ("fp16", "fp16")]
GRADIENTS = [
    (*pair, *rest)
    for pair, *rest in itertools.product(PAIRS, SIZES, (None, 30.0), (False, True), (COLUMNS, ROWS), FIRST)
]


@pytest.mark.parametrize(
    ("dtype", "out", "n", "softcap", "shifted", "adjacent", "first"),
    marked(GRADIENTS, [("fp32", "bf16", 4099, 30.0, True, COLUMNS, "first 64 bits")]),
)
def test_aot_loss_gradient(dtype, out, n, softcap, shifted, adjacent, first):
    z, target, row = logits(dtype, n, adjacent), empty(TOKENS, dtype=torch.int64), empty(TOKENS, dtype=torch.float32)
    d, shift = empty(TOKENS, n, dtype=DTYPES[out]), row if shifted else None
    named = cross_entropy.gradient_arguments(z, d, target, FIRST[first], row, row, row, row, shift, softcap)
    assert_no_spill(build(cross_entropy.gradient_kernel, named))
