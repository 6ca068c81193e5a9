"""kernels.wgrad compiled ahead of time for sm_90: both operands transposed, fp32 read, added to and written."""

import pytest
import torch

from tpmp_kernels.kernels import tiles

pytest.importorskip("triton")

from aot_checks import assert_no_spill, assert_wide
from aot_gemm import ALIGNED, ARCHES, DTYPES, TOKENS, cases, check, empty, sampled

from tpmp_kernels.kernels import aot, wgrad

# The token count is the inner dimension here, and rows of the result are the features k of dZ's.
EPILOGUES = [tiles.Epilogue(residual=add) for add in (False, True)]


def aligned(n: int, k: int) -> bool:
    return n == k == ALIGNED


DX = "dx of a slice"
GRID = cases("wgrad", EPILOGUES, EPILOGUES, aligned) + cases("wgrad", EPILOGUES[1:], EPILOGUES[1:], aligned, form=DX)
SAMPLE = sampled(GRID, EPILOGUES[1:], 1)


def check_wgrad(case) -> None:
    dtype, n, k = DTYPES[case.dtype], case.n, case.k
    if case.form == DX:
        # The sum of a loss over slices of its vocabulary: dx += d @ W_s.
        x, weight, out = empty(TOKENS, k, dtype=dtype), empty(k, n, dtype=dtype).t(), (TOKENS, n)
    else:
        x, weight, out = empty(TOKENS, k, dtype=dtype).t(), empty(TOKENS, n, dtype=dtype).t(), (k, n)
    named = wgrad.arguments(x, weight, empty(*out, dtype=torch.float32), case.epilogue.residual, case.tile)
    check(wgrad.wgrad_kernel, named, case)


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_aot_wgrad(case):
    check_wgrad(case)


@pytest.mark.full
@pytest.mark.parametrize("case", [c for c in GRID if c not in SAMPLE], ids=str)
def test_aot_wgrad_full(case):
    check_wgrad(case)


def test_aot_wgrad_takes_an_odd_token_count_at_full_speed():
    """Tokens are rows of both operands, so their number does not decide how wide the loads are."""
    case = SAMPLE[0]
    dz, x = (empty(4099, 4096, dtype=torch.bfloat16) for _ in range(2))
    main_grad = empty(4096, 4096, dtype=torch.float32)
    check(wgrad.wgrad_kernel, wgrad.arguments(dz.t(), x.t(), main_grad, True, case.tile), case)


@pytest.mark.parametrize("arch", [pytest.param(a, marks=[pytest.mark.full] * (a != "sm90")) for a in ARCHES])
def test_aot_sum_of_the_parts(arch):
    parts, out = empty(4, 1024, 1024, dtype=torch.float32), empty(1024, 1024, dtype=torch.float32)
    named = {"parts": parts, "out": out, "size": out.numel(), "splits": 4, "ADD": True, "BLOCK": wgrad.ADD_BLOCK}
    built = aot.compile(wgrad.add_up_kernel, named, arch=arch, num_warps=4, num_stages=3)
    assert_no_spill(built)
    if arch != "gfx942":
        assert_wide(built)
