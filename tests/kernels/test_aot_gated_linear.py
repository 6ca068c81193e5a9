"""kernels.gated_linear compiled ahead of time for sm_90: two accumulators fit, spill nothing, use the tensor cores."""

import pytest

from tpmp_kernels import reference
from tpmp_kernels.kernels import tiles

pytest.importorskip("triton")

from aot_gemm import ALIGNED, DTYPES, TOKENS, cases, check, empty, sampled

from tpmp_kernels.kernels import gated_linear

EPILOGUES = [tiles.Epilogue(a, preact=p) for a in reference.GATES for p in (False, True)]


def aligned(n: int, k: int) -> bool:
    return k == ALIGNED


GRID = cases("gated_linear", EPILOGUES, [e for e in EPILOGUES if e.activation == "gelu"], aligned)
GRID += cases("gated_linear", [tiles.Epilogue("silu", preact=True)], [], aligned, form="gate and up alone")
SAMPLE = sampled(GRID, [tiles.Epilogue("gelu", preact=True)], 1)


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
