"""Which tile a GEMM runs with: a pure function of the problem, in integers, the same on every rank.

Nothing here is timed: ranks that timed would choose differently, and differ in numerics or deadlock. The candidates of
each architecture are data, in tables/, made by `python -m benchmarks.tune` on a chip or taken from public lists; each
row says which. Standard library only, so that a planner can ask without Triton.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

FOLDER = Path(__file__).with_name("tables")
OPERATIONS = ("linear", "gated_linear", "mlp_dz", "wgrad", "logits", "logits_d")
# How operands come: by TMA descriptors, by pointers 16 bytes at a time, or one element at a time. The last is for rows
# that are not aligned to 16 bytes, and passes through registers.
LOADS = ("descriptors", "vectors", "scalars")


@dataclass(frozen=True)
class Tile:
    """One program computes block_m x block_n of Y in steps of block_k; group_m row blocks share one sweep of W.

    Its epilogue works on `part` columns at a time. `persistent`: as many programs as multiprocessors, each taking one
    tile after another; `flatten`: the loads of the next tile begin under the epilogue of this one.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    part: int
    loads: str
    persistent: bool = False
    flatten: bool = False


@dataclass(frozen=True)
class Epilogue:
    """What happens between the accumulator and memory; operands of a full [M, N] cost registers and bandwidth.

    `wide`: fp32 results of a half-precision product. In mlp_dz `bias` is the bias gradient's partial sums, `residual`
    the second factor of a gated MLP, and `preact` the activations made again. In logits and logits_d, whose logits are
    not stored, `activation` is "softcap" and `residual` label smoothing: the shortfall or the shift of a row.
    """

    activation: str | None = None
    bias: bool = False
    residual: bool = False
    preact: bool = False
    wide: bool = False


@dataclass(frozen=True)
class _Row:
    """A candidate of a table: a tile, the cost of one output element in percent of the best tile's, and for what.

    `spills`: the epilogues that fit neither registers nor shared memory, each by the fields that matter; `since`,
    `until`: the Triton versions that it serves, as (major, minor), `until` exclusive.
    """

    tile: Tile
    operations: tuple[str, ...]
    dtypes: tuple[str, ...]
    cost: int
    spills: tuple[dict, ...]
    since: tuple[int, int]
    until: tuple[int, int]
    origin: str

    def serves(self, operation: str, dtype: str, epilogue: Epilogue, version: tuple[int, int]) -> bool:
        return (
            operation in self.operations
            and dtype in self.dtypes
            and self.since <= version < self.until
            and not any(all(getattr(epilogue, name) == value for name, value in each.items()) for each in self.spills)
        )


def table(arch: str) -> str:
    """The name of the table that serves an architecture: "sm90", "sm103", "gfx942"."""
    if arch.startswith("gfx"):
        return "gfx942"
    return {"sm90": "sm90", "sm100": "sm100", "sm103": "sm100"}.get(arch, "sm80")


def shared_limit(arch: str) -> int:
    """Bytes of shared memory that one thread block may use on `arch`: "sm90" for compute capability 9.0."""
    return _SHARED.get(arch, 65_536 if arch.startswith("gfx") else 101_376)


# CUDA programming guide, table of technical data; AMD CDNA 3 instruction set, LDS.
_SHARED = {"sm80": 166_912, "sm87": 166_912, "sm90": 232_448, "sm100": 232_448, "sm103": 232_448}


def shipped(
    operation: str, dtype: str, *, arch: str, epilogue: Epilogue, triton_version: str, aligned: bool
) -> list[Tile]:
    """Every tile that `tile` can return for such a problem: what the ahead-of-time tests compile."""
    return [row.tile for row in _candidates(operation, dtype, arch, epilogue, triton_version, aligned)]


@lru_cache(maxsize=4096)
def tile(
    operation: str,
    m: int,
    n: int,
    k: int,
    dtype: str,
    *,
    arch: str,
    sms: int,
    epilogue: Epilogue,
    triton_version: str,
    aligned: bool = True,
) -> Tile:
    """The tile for a result [m, n] = X [m, k] @ W^T in dtype "bf16" | "fp16" | "fp32" on `sms` multiprocessors.

    The least of waves x work per wave, where a wave is one tile on every multiprocessor; ties go to the larger tile.
    `operation` is one of OPERATIONS; `aligned`: the rows of both operands begin at multiples of 16 bytes.
    """

    def cost(row: _Row) -> tuple[int, int]:
        area = row.tile.block_m * row.tile.block_n
        tiles = -(-m // row.tile.block_m) * -(-n // row.tile.block_n)
        return -(-tiles // sms) * area * row.cost, -area

    return min(_candidates(operation, dtype, arch, epilogue, triton_version, aligned), key=cost).tile


def splits(m: int, n: int, k: int, tile: Tile, sms: int) -> int:
    """Into how many parts of K a product is cut that has too few tiles for the chip; the parts are added in order.

    Where m and n are small: at most half the multiprocessors have a tile. A part is at least 8 steps of block_k, since
    each also writes its tile to memory and reads it back.
    """
    tiles = -(-m // tile.block_m) * -(-n // tile.block_n)
    return max(1, min(sms // max(tiles, 1), k // (8 * tile.block_k), 16))


def _candidates(
    operation: str, dtype: str, arch: str, epilogue: Epilogue, triton_version: str, aligned: bool
) -> list[_Row]:
    version = tuple(int(part) for part in triton_version.split(".")[:2])
    rows = [row for row in rows_of(table(arch)) if row.serves(operation, dtype, epilogue, version)]
    fitting = [row for row in rows if shared_estimate(row.tile, operation, dtype) <= shared_limit(arch)]
    for loads in ("descriptors", "vectors") if aligned else ("scalars",):
        found = [row for row in fitting if row.tile.loads == loads]
        if found:
            return found
    raise LookupError(f"tables/{table(arch)}.json has no tile for {operation} {dtype} {epilogue} aligned={aligned}")


def shared_estimate(tile: Tile, operation: str, dtype: str) -> int:
    """Bytes of shared memory at least: the operands of every stage."""
    itemsize = 4 if dtype == "fp32" else 2
    columns = tile.block_m + tile.block_n * (2 if operation == "gated_linear" else 1)
    return tile.num_stages * columns * tile.block_k * itemsize


@dataclass(frozen=True)
class Chip:
    """Rates of a chip: half-precision TFLOP/s of its library's GEMM, GB/s of a copy (read and write), and the speed of
    our best tile in percent of the library's."""

    tflops: int
    gbytes: int
    of_library: int
    origin: str


@lru_cache
def chip(name: str) -> Chip:
    """The chip of tables/`name`.json."""
    return Chip(**_read(name)["chip"])


@lru_cache
def rows_of(name: str) -> tuple[_Row, ...]:
    """The rows of tables/`name`.json, one for each way of loading that an entry lists."""
    return tuple(_row(entry, loads) for entry in _read(name)["rows"] for loads in entry["loads"])


def _read(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text())


def _row(entry: dict, loads: str) -> _Row:
    persistent, flatten = entry.get("persistent", False), entry.get("flatten", False)
    tile = Tile(*entry["block"], entry["group_m"], entry["warps"], entry["stages"], entry["part"], loads,
                persistent, flatten)  # fmt: skip
    since, until = (tuple(map(int, text.split("."))) for text in entry.get("triton", ["3.6", "4.0"]))
    return _Row(
        tile, tuple(entry["operations"]), tuple(entry["dtypes"]), entry["cost"], tuple(entry.get("spills", ())),
        since, until, entry["origin"],
    )  # fmt: skip
