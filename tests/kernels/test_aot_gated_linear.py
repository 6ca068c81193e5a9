"""kernels.gated_linear compiled ahead of time for sm_90: two accumulators fit, spill nothing, use the tensor cores."""

import pytest

from tpmp_kernels import reference
from tpmp_kernels.kernels import tiles

pytest.importorskip("triton")

from aot_gemm import DTYPES, TOKENS, cases, check, empty, sampled

from tpmp_kernels.kernels import gated_linear

GRID = cases("gated_linear", [tiles.Epilogue(a, preact=p) for a in reference.GATES for p in (False, True)])
GRID += cases("gated_linear", [tiles.Epilogue("silu", preact=True)], form="gate and up alone")
HARDEST = [
    case
    for case in GRID
    if case.dtype == "bf16"
    and case.tile.block_m == 128
    and case.n == case.k
    and case.epilogue == tiles.Epilogue("gelu", preact=True)
]
SAMPLE = sampled(GRID, HARDEST, 1)


def check_gated_linear(case) -> None:
    dtype, e, m, n, k = DTYPES[case.dtype], case.epilogue, TOKENS, case.n, case.k
    named = gated_linear.arguments(
        empty(m, k, dtype=dtype), empty(n, k, dtype=dtype), empty(n, k, dtype=dtype),
        empty(m, n, dtype=dtype, wanted=not case.form), *(empty(m, n, dtype=dtype, wanted=e.preact) for _ in range(2)),
        e.activation, case.tile,
    )  # fmt: skip
    check(gated_linear.gated_linear_kernel, named, case)


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_aot_gated_linear(case):
    check_gated_linear(case)


@pytest.mark.full
@pytest.mark.parametrize("case", [c for c in GRID if c not in SAMPLE], ids=str)
def test_aot_gated_linear_full(case):
    check_gated_linear(case)
