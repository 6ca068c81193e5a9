"""Every shipped tile x epilogue compiled ahead of time for sm_90: it fits, spills nothing, uses the tensor cores."""

import itertools
import random

import pytest
import torch

from tpmp_kernels import reference
from tpmp_kernels.kernels import tiles

pytest.importorskip("triton")

from aot_checks import assert_no_spill

from tpmp_kernels.kernels import activation_grad, aot, linear

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ACTIVATIONS = (None, *reference.ACTIVATIONS)
SHAPE = (4096, 4096)


def grid() -> list[tuple[str, tiles.Tile, tiles.Epilogue, int]]:
    """Every tile with every epilogue that may meet it, for a K whose rows are aligned to 16 bytes and one odd K."""
    flags = [dict(zip(("bias", "residual", "preact"), f, strict=True)) for f in itertools.product((0, 1), repeat=3)]
    return [
        (dtype, tile, epilogue, k)
        for dtype, k, activation, flag in itertools.product(DTYPES, (4096, 4099), ACTIVATIONS, flags)
        for epilogue in [tiles.Epilogue(activation, **flag)]
        for tile in tiles.shipped(k, dtype, arch=90, epilogue=epilogue)
    ]


def name_of(case) -> str:
    dtype, tile, e, k = case
    return f"{dtype}-{tile.block_m}x{tile.block_n}-{e.activation}-bias{e.bias}-res{e.residual}-pre{e.preact}-k{k}"


GRID = grid()
# The most demanding epilogue of the largest tile, and a seeded few of all the others.
HARDEST = [c for c in GRID if c[0] == "bf16" and c[1].block_n == 256 and c[2] == tiles.Epilogue("gelu", 1, 1, 1)]
SAMPLE = HARDEST + random.Random(5).sample([c for c in GRID if c not in HARDEST], 6)


def check(dtype: str, tile: tiles.Tile, epilogue: tiles.Epilogue, k: int) -> None:
    def empty(*shape: int, wanted: bool = True) -> torch.Tensor | None:
        return torch.empty(*shape, dtype=DTYPES[dtype], device="meta") if wanted else None

    (m, n), e = SHAPE, epilogue
    named = linear.arguments(
        empty(m, k), empty(n, k), empty(n, wanted=e.bias), empty(m, n, wanted=e.residual),
        empty(m, n), empty(m, n, wanted=e.preact), e.activation, tile,
    )  # fmt: skip
    built = aot.compile(
        linear.linear_kernel, named, capability=90, num_warps=tile.num_warps, num_stages=tile.num_stages
    )
    assert built.shared <= tiles.shared_limit(90)
    assert_no_spill(built)
    if dtype == "fp32":
        assert built.count("HGMMA") == 0, "fp32 products must be IEEE, not TF32"
    else:
        assert built.count("HGMMA") > 0, "no tensor-core product"
        assert built.register_operands() == 0, "a product takes A from registers"


@pytest.mark.parametrize("case", SAMPLE, ids=name_of)
def test_aot_linear(case):
    check(*case)


@pytest.mark.full
@pytest.mark.parametrize("case", [c for c in GRID if c not in SAMPLE], ids=name_of)
def test_aot_linear_full(case):
    check(*case)


@pytest.mark.parametrize(
    "activation", [pytest.param(a, marks=[pytest.mark.full] * (a != "gelu")) for a in ACTIVATIONS[1:]]
)
def test_aot_activation_grad(activation):
    m, n = SHAPE
    dy, z, dz = (torch.empty(m, n, dtype=torch.bfloat16, device="meta") for _ in range(3))
    partial = torch.empty(m // activation_grad.BLOCK_M, n, device="meta")
    named = activation_grad.arguments(dy, z, dz, partial, activation)
    kernel = activation_grad.activation_grad_kernel
    assert_no_spill(aot.compile(kernel, named, capability=90, num_warps=4, num_stages=1))


def test_aot_finds_an_operand_in_registers():
    """The check itself: a cast between load and dot makes the product take A from registers, and is seen."""
    import triton
    from aot_counterexample import cast_before_dot

    assert triton.__version__
    named = {name: torch.empty(128, 64, dtype=torch.bfloat16, device="meta") for name in ("x", "w", "y")}
    built = aot.compile(cast_before_dot, {**named, "k": 4096}, capability=90, num_warps=4, num_stages=3)
    assert built.count("HGMMA") > 0
    assert built.register_operands() > 0
