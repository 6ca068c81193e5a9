"""What the ahead-of-time tests of the GEMM kernels share: operands without memory, the grid of a kernel, its checks."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from aot_checks import assert_no_spill

from tpmp_kernels.kernels import aot, tiles

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOKENS, ALIGNED, ODD = 4096, 4096, 4099
ARCHES = ("sm90", "sm100", "sm80", "gfx942")


@dataclass(frozen=True)
class Case:
    """One kernel for a result of n columns and an inner dimension k. `form`: what the epilogue cannot say."""

    arch: str
    dtype: str
    tile: tiles.Tile
    epilogue: tiles.Epilogue
    n: int
    k: int
    form: str = ""

    def __str__(self) -> str:
        t, e = self.tile, self.epilogue
        flags = [name for name in ("bias", "residual", "preact", "wide") if getattr(e, name)]
        parts = [
            self.arch,
            self.dtype,
            f"{t.block_m}x{t.block_n}",
            str(e.activation),
            *flags,
            *filter(None, [self.form]),
        ]
        return "-".join([*parts, f"n{self.n}", f"k{self.k}"])


def cases(
    operation: str, epilogues: list[tiles.Epilogue], few: list[tiles.Epilogue], aligned: Callable[[int, int], bool],
    form: str = "",
) -> list[Case]:  # fmt: skip
    """Every shipped tile with the least and the most an epilogue may do, rows in memory aligned to 16 bytes or odd.

    `few` of the epilogues for all tiles. For the bf16 tile that has most in registers, rows aligned: each activation
    with all that may stand beside it, and on sm_90 every epilogue. fp16 differs from bf16 in the name of the
    instruction. `aligned(n, k)`: whether the operands' rows are.
    """

    def full(epilogue: tiles.Epilogue) -> bool:
        return flags(epilogue) == max(flags(other) for other in epilogues if other.activation == epilogue.activation)

    grid = []
    for arch in ARCHES:
        for dtype in DTYPES:
            for n, k in [(ALIGNED, ALIGNED), (ODD, ALIGNED), (ALIGNED, ODD), (ODD, ODD)]:
                if n != k and dtype != "bf16":
                    continue
                for epilogue in epilogues:
                    if epilogue.wide and dtype == "fp32":
                        continue
                    found = tiles.shipped(
                        operation, dtype, arch=arch, epilogue=epilogue, triton_version=triton.__version__,
                        aligned=aligned(n, k),
                    )  # fmt: skip
                    largest = (dtype, n, k) == ("bf16", ALIGNED, ALIGNED) and (arch == "sm90" or full(epilogue))
                    chosen = found if epilogue in few else [max(found, key=area)] if largest else []
                    grid += [Case(arch, dtype, tile, epilogue, n, k, form) for tile in chosen]
    return grid


def flags(epilogue: tiles.Epilogue) -> int:
    return epilogue.bias + epilogue.residual + epilogue.preact + epilogue.wide


def area(tile: tiles.Tile) -> int:
    return tile.block_m * tile.block_n


def sampled(grid: list[Case], hardest: list[tiles.Epilogue], count: int) -> list[Case]:
    """The most demanding case of sm_90, and a seeded few of its others; other architectures take their turn in full."""
    own = [case for case in grid if case.arch == "sm90"]
    first = [
        max(
            (c for c in own if (c.dtype, c.n, c.k, c.epilogue) == ("bf16", ALIGNED, ALIGNED, e)),
            key=lambda c: area(c.tile),
        )
        for e in hardest
    ]
    return first + random.Random(5).sample([case for case in own if case not in first], count)


def empty(*shape: int, dtype: torch.dtype, wanted: bool = True) -> torch.Tensor | None:
    return torch.empty(*shape, dtype=dtype, device="meta") if wanted else None


def check(kernel: Any, named: dict[str, Any], case: Case) -> None:
    tile = case.tile
    built = aot.compile(kernel, named, arch=case.arch, num_warps=tile.num_warps, num_stages=tile.num_stages)
    assert built.shared <= tiles.shared_limit(case.arch), f"{built.shared} B of shared memory"
    assert_no_spill(built)
    if case.dtype == "fp32":
        assert built.products() == 0, "fp32 products must be IEEE, not TF32"
        return
    assert built.products() > 0, "no tensor-core product"
    assert built.register_operands() == 0, "a product takes A from registers"
    assert tile.loads == "scalars" or case.arch == "gfx942" or built.copies() > 0, "no asynchronous copy"
