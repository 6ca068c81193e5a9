"""kernels.wgrad compiled ahead of time for sm_90: both operands transposed, fp32 read, added to and written."""

import pytest
import torch

from tpmp_kernels.kernels import tiles

pytest.importorskip("triton")

from aot_gemm import DTYPES, SIZES, TOKENS, Case, check, empty, sampled

from tpmp_kernels.kernels import wgrad

# The token count is the inner dimension here, and rows of the result are the features k of dZ's.
GRID = [
    Case(dtype, tile, tiles.Epilogue(residual=add), n, k)
    for dtype in DTYPES
    for n, k in SIZES[dtype]
    for add in (False, True)
    for tile in tiles.shipped("wgrad", k, n, TOKENS, dtype, arch=90, epilogue=tiles.Epilogue(residual=add))
]
HARDEST = [c for c in GRID if c.dtype == "bf16" and c.tile.block_n == 256 and c.epilogue.residual]
SAMPLE = sampled(GRID, HARDEST, 1)


def check_wgrad(case) -> None:
    dtype, n, k = DTYPES[case.dtype], case.n, case.k
    dz, x, main_grad = empty(TOKENS, k, dtype=dtype), empty(TOKENS, n, dtype=dtype), empty(k, n, dtype=torch.float32)
    check(wgrad.wgrad_kernel, wgrad.arguments(dz, x, main_grad, case.epilogue.residual, case.tile), case)


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_aot_wgrad(case):
    check_wgrad(case)


@pytest.mark.full
@pytest.mark.parametrize("case", [c for c in GRID if c not in SAMPLE], ids=str)
def test_aot_wgrad_full(case):
    check_wgrad(case)


def test_aot_wgrad_takes_an_odd_token_count_at_full_speed():
    """Tokens are rows of both operands, so their number does not decide how wide the loads are."""
    (case,) = HARDEST
    dz, x = (empty(4099, 4096, dtype=torch.bfloat16) for _ in range(2))
    main_grad = empty(4096, 4096, dtype=torch.float32)
    check(wgrad.wgrad_kernel, wgrad.arguments(dz, x, main_grad, True, case.tile), case)
