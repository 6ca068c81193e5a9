"""What the ahead-of-time tests of the GEMM kernels share: operands without memory, the grid of a kernel, its checks."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from aot_checks import assert_no_spill

from tpmp_kernels.kernels import aot, tiles

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOKENS, ALIGNED, ODD = 4096, 4096, 4099
# (n, k): columns of the result, inner dimension. bf16 and fp16 differ in nothing but the name of the instruction.
SIZES = {
    "bf16": [(ALIGNED, ALIGNED), (ODD, ALIGNED), (ALIGNED, ODD), (ODD, ODD)],
    "fp16": [(ALIGNED, ALIGNED), (ODD, ODD)],
    "fp32": [(ALIGNED, ALIGNED), (ODD, ODD)],
}


@dataclass(frozen=True)
class Case:
    """One kernel for a result of n columns and an inner dimension k. `form`: what the epilogue cannot say."""

    dtype: str
    tile: tiles.Tile
    epilogue: tiles.Epilogue
    n: int
    k: int
    form: str = ""

    def __str__(self) -> str:
        t, e = self.tile, self.epilogue
        flags = [name for name in ("bias", "residual", "preact", "wide") if getattr(e, name)]
        parts = [self.dtype, f"{t.block_m}x{t.block_n}", str(e.activation), *flags, *([self.form] if self.form else [])]
        return "-".join([*parts, f"n{self.n}", f"k{self.k}"])


def cases(operation: str, epilogues: list[tiles.Epilogue], form: str = "") -> list[Case]:
    """Every shipped tile with every epilogue that may meet it, rows in memory aligned to 16 bytes or odd."""
    return [
        Case(dtype, tile, epilogue, n, k, form)
        for dtype in DTYPES
        for n, k in SIZES[dtype]
        for epilogue in epilogues
        if not (epilogue.wide and dtype == "fp32")
        for tile in tiles.shipped(operation, TOKENS, n, k, dtype, arch=90, epilogue=epilogue)
    ]


def sampled(grid: list[Case], always: list[Case], count: int) -> list[Case]:
    """The most demanding cases, and a seeded few of all the others."""
    return always + random.Random(5).sample([case for case in grid if case not in always], count)


def empty(*shape: int, dtype: torch.dtype, wanted: bool = True) -> torch.Tensor | None:
    return torch.empty(*shape, dtype=dtype, device="meta") if wanted else None


def check(kernel: Any, named: dict[str, Any], case: Case) -> None:
    tile = case.tile
    built = aot.compile(kernel, named, capability=90, num_warps=tile.num_warps, num_stages=tile.num_stages)
    assert built.shared <= tiles.shared_limit(90)
    assert_no_spill(built)
    if case.dtype == "fp32":
        assert built.count("HGMMA") == 0, "fp32 products must be IEEE, not TF32"
        return
    assert built.count("HGMMA") > 0, "no tensor-core product"
    assert built.register_operands() == 0, "a product takes A from registers"
    assert ODD in (case.n, case.k) or built.count("LDGSTS") > 0, "no asynchronous copy"
