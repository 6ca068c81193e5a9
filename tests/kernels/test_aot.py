"""kernels.linear and activation_grad compiled ahead of time for sm_90: they fit, spill nothing, use tensor cores."""

import itertools

import pytest
import torch

from tpmp_kernels import reference
from tpmp_kernels.kernels import tiles

pytest.importorskip("triton")

from aot_checks import assert_no_spill, assert_wide
from aot_gemm import ALIGNED, DTYPES, TOKENS, cases, check, empty, sampled

from tpmp_kernels.kernels import activation_grad, aot, linear

ACTIVATIONS = (None, *reference.ACTIVATIONS)
FLAGS = [
    dict(zip(("bias", "residual", "preact", "wide"), map(bool, flags), strict=True))
    for flags in itertools.product((0, 1), repeat=4)
]
EPILOGUES = [tiles.Epilogue(activation, **flags) for activation in ACTIVATIONS for flags in FLAGS]
# Nothing and everything; of the activations, gelu (erf) keeps most in registers.
FEW = [tiles.Epilogue(a, b, b, b, wide) for a in (None, "gelu") for b in (False, True) for wide in (False, True)]
# Pre-activations alone, as a backward makes them again: no activation takes part.
AGAIN = [tiles.Epilogue("gelu", bias=bias, preact=True, wide=wide) for bias in (False, True) for wide in (False, True)]


def aligned(n: int, k: int) -> bool:
    return k == ALIGNED


GRID = cases("linear", EPILOGUES, FEW, aligned) + cases("linear", AGAIN, [], aligned, form="z alone")
SAMPLE = sampled(GRID, [tiles.Epilogue("gelu", True, True, True)], 3)


def check_linear(case) -> None:
    dtype, e, m, n, k = DTYPES[case.dtype], case.epilogue, TOKENS, case.n, case.k
    out = torch.float32 if e.wide else dtype
    named = linear.arguments(
        empty(m, k, dtype=dtype), empty(n, k, dtype=dtype), empty(n, dtype=dtype, wanted=e.bias),
        empty(m, n, dtype=out, wanted=e.residual), empty(m, n, dtype=out, wanted=not case.form),
        empty(m, n, dtype=out, wanted=e.preact), e.activation, case.tile,
    )  # fmt: skip
    check(linear.linear_kernel, named, case)


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_aot_linear(case):
    check_linear(case)


@pytest.mark.full
@pytest.mark.parametrize("case", [c for c in GRID if c not in SAMPLE], ids=str)
def test_aot_linear_full(case):
    check_linear(case)


@pytest.mark.parametrize(
    "activation", [pytest.param(a, marks=[pytest.mark.full] * (a != "gelu")) for a in ACTIVATIONS[1:]]
)
def test_aot_activation_grad(activation):
    m, n = TOKENS, 4096
    dy, z, dz = (torch.empty(m, n, dtype=torch.bfloat16, device="meta") for _ in range(3))
    partial = torch.empty(m // activation_grad.BLOCK_M, n, device="meta")
    named = activation_grad.arguments(dy, z, dz, partial, activation)
    kernel = activation_grad.activation_grad_kernel
    built = aot.compile(kernel, named, arch="sm90", num_warps=activation_grad.WARPS, num_stages=1)
    assert_no_spill(built)
    assert_wide(built)


def test_aot_finds_an_operand_in_registers():
    """The check itself: a cast between load and dot makes the product take A from registers, and is seen."""
    import triton
    from aot_counterexample import cast_before_dot

    assert triton.__version__
    named = {name: torch.empty(128, 64, dtype=torch.bfloat16, device="meta") for name in ("x", "w", "y")}
    built = aot.compile(cast_before_dot, {**named, "k": 4096}, arch="sm90", num_warps=4, num_stages=3)
    assert built.products() > 0
    assert built.register_operands() > 0


LOOPS = """
        /*0000*/  STL [R1], R2 ;
        /*0010*/  MOV R3, R4 ;
        /*0020*/  LDL R5, [R1+0x4] ;
        /*0030*/  @P0 BRA 0x20 ;
        /*0040*/  STL [R1+0x8], R6 ;
        /*0050*/  @P1 BRA `(.L_x_1) 0x10 ;
        /*0060*/  LDL R7, [R1+0x8] ;
"""


def test_aot_finds_what_goes_to_memory_within_a_loop():
    """One load in the inner loop; a store in the outer one, and one of each outside, are once a tile."""
    built = aot.Compiled("sm90", 0, 0, 16, LOOPS)
    assert (built.count("LDL"), built.count("STL")) == (2, 2)
    assert (built.count_in_loops("LDL"), built.count_in_loops("STL")) == (1, 0)
    with pytest.raises(AssertionError, match="1 of them in an innermost loop"):
        assert_no_spill(built)
    once = aot.Compiled("sm90", 0, 0, 16, LOOPS.replace("LDL R5", "LDG R5"))
    assert_no_spill(once)
    with pytest.raises(AssertionError, match="stack 72 B"):
        assert_no_spill(aot.Compiled("sm90", 0, 0, 72, once.code))
