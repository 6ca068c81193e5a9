"""kernels.mlp compiled ahead of time for sm_90: derivative, h and bias sums in the epilogue of a transposed product."""

import itertools

import pytest
import torch

from tpmp_kernels import reference
from tpmp_kernels.kernels import tiles

pytest.importorskip("triton")

from aot_gemm import ALIGNED, DTYPES, TOKENS, cases, check, empty, sampled

from tpmp_kernels.kernels import mlp

PLAIN = [
    tiles.Epilogue(activation, bias=bias, preact=h)
    for activation, bias, h in itertools.product(reference.ACTIVATIONS, (False, True), (False, True))
]
GATED = [tiles.Epilogue(activation, residual=True, preact=h) for activation in reference.GATES for h in (False, True)]
HARDEST = [tiles.Epilogue("gelu", bias=True, preact=True), tiles.Epilogue("gelu", residual=True, preact=True)]


def aligned(n: int, k: int) -> bool:
    return n == k == ALIGNED


GRID = cases("mlp_dz", PLAIN + GATED, [tiles.Epilogue("gelu"), *HARDEST], aligned)
SAMPLE = sampled(GRID, HARDEST, 1)


def check_mlp(case) -> None:
    dtype, e, m, n, k = DTYPES[case.dtype], case.epilogue, TOKENS, case.n, case.k

    def hidden(wanted: bool = True) -> torch.Tensor | None:
        return empty(m, n, dtype=dtype, wanted=wanted)

    partial = empty(m // case.tile.block_m, n, dtype=torch.float32, wanted=e.bias)
    named = mlp.arguments(
        empty(m, k, dtype=dtype), empty(k, n, dtype=dtype), hidden(), hidden(e.residual), hidden(), hidden(e.residual),
        hidden(e.preact), partial, e.activation, case.tile,
    )  # fmt: skip
    check(mlp.mlp_dz_kernel, named, case)


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_aot_mlp(case):
    check_mlp(case)


@pytest.mark.full
@pytest.mark.parametrize("case", [c for c in GRID if c not in SAMPLE], ids=str)
def test_aot_mlp_full(case):
    check_mlp(case)
