"""Make a table of tiles on the chip that is here: `python -m benchmarks.tune`, offline, once for each chip.

Every candidate is compiled ahead of time and dropped where it spills or does not fit; the others take turns on one
large problem. The best of each size of block becomes a row, with its cost in percent of the best of all, and the
speed of the best GEMM alone against the library's becomes the chip's `of_library`. Rows of what was not tuned stay.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.gemms import EPILOGUES, Gemm
from tpmp_kernels.bench import interleave
from tpmp_kernels.kernels import tiles

PROBLEM = (8192, 8192, 4096)
DTYPES = ["bf16", "fp16"]  # tuned in bf16; fp16 differs in the name of the instruction
BLOCKS = [(256, 128), (128, 256), (128, 128), (64, 256), (64, 128), (64, 64)]


def candidates(operation: str, arch: str) -> list[tiles.Tile]:
    """Every tile worth a compilation: blocks of the public lists, with the most stages that fit and one less."""
    loads = "descriptors" if tiles.table(arch) in ("sm90", "sm100") else "vectors"
    forms = [(False, False), (True, False), (True, True)] if loads == "descriptors" else [(False, False)]
    found = []
    for block, depth, warps in itertools.product(BLOCKS, (32, 64, 128), (4, 8)):
        if warps == 4 and block[0] * block[1] > 128 * 128:
            continue
        one = tiles.Tile(*block, depth, 8, warps, 1, 64, loads)
        most = min(7, tiles.shared_limit(arch) // tiles.shared_estimate(one, operation, "bf16"))
        for stages, (persistent, flatten) in itertools.product(range(max(2, most - 1), most + 1), forms):
            found.append(replace(one, num_stages=stages, persistent=persistent, flatten=flatten))
    return found


def compiles(operation: str, arch: str, tile: tiles.Tile) -> bool:
    """Whether the kernel fits the chip on this tile and spills nothing, in its usual form and with every operand."""
    from tpmp_kernels.kernels import aot

    full = replace(EPILOGUES[operation], preact=operation != "wgrad", residual=operation != "gated_linear")
    for epilogue in {EPILOGUES[operation], full}:
        kernel, named = Gemm(operation, *PROBLEM, device="meta").prepared(tile, epilogue)
        built = aot.compile(kernel, named, arch=arch, num_warps=tile.num_warps, num_stages=tile.num_stages)
        if built.stack or built.shared > tiles.shared_limit(arch):
            return False
    return True


def rows_from(seconds: Mapping[tiles.Tile, float], operation: str, origin: str) -> list[dict]:
    """The fastest tile of each block size as entries of a table, best first, with costs per element in percent."""
    best: dict[tuple[int, int], tiles.Tile] = {}
    for tile in sorted(seconds, key=seconds.__getitem__):
        best.setdefault((tile.block_m, tile.block_n), tile)
    fastest = min(seconds.values())
    return [
        {
            "operations": [operation], "dtypes": DTYPES, "loads": [tile.loads],
            "block": [tile.block_m, tile.block_n, tile.block_k], "group_m": tile.group_m, "warps": tile.num_warps,
            "stages": tile.num_stages, "part": tile.part, "cost": round(100 * seconds[tile] / fastest),
            "persistent": tile.persistent, "flatten": tile.flatten, "origin": origin,
        }
        for tile in best.values()
    ]  # fmt: skip


def merged(table: dict, rows: Iterable[dict]) -> dict:
    """The table with `rows` in place of what it had for their operation, dtypes and loads; all else as it was."""
    rows = list(rows)
    kept = []
    for entry in table["rows"]:
        operations = [each for each in entry["operations"] if not any(_replaces(row, entry, each) for row in rows)]
        kept += [{**entry, "operations": operations}] if operations else []
    return {**table, "rows": [*rows, *kept]}


def _replaces(row: dict, entry: dict, operation: str) -> bool:
    return operation in row["operations"] and row["dtypes"] == entry["dtypes"] and row["loads"] == entry["loads"]


def write(table: dict, path: Path) -> None:
    """One row a line, so that a diff shows which rows changed."""
    rows = ",\n".join(f"  {json.dumps(row)}" for row in table["rows"])
    path.write_text(f'{{"chip": {json.dumps(table["chip"])},\n "rows": [\n{rows}\n]}}\n')


def measure(operation: str, arch: str, workers: int) -> dict[tiles.Tile, float]:
    """Seconds of one call on each tile that compiles, all taking turns."""
    tried = candidates(operation, arch)
    with ProcessPoolExecutor(workers) as pool:
        fits = pool.map(compiles, itertools.repeat(operation), itertools.repeat(arch), tried)
        usable = [tile for tile, fit in zip(tried, fits, strict=True) if fit]
    problem = Gemm(operation, *PROBLEM)
    calls = {tile: problem.call(tile) for tile in usable}
    timings = interleave(calls, rounds=9, iterations=5, warmup=2, sync=torch.cuda.synchronize)
    return {tile: timing.median for tile, timing in timings.items()}


def of_library(tile: tiles.Tile) -> int:
    """The speed of the GEMM alone on this tile in percent of the library's."""
    m, n, k = PROBLEM
    problem = Gemm("linear", m, n, k)
    x, weight = problem.draw(m, k), problem.draw(n, k)
    contenders = {"ours": problem.call(tile, tiles.Epilogue()), "library": lambda: F.linear(x, weight)}
    timings = interleave(contenders, rounds=15, iterations=10, warmup=2, sync=torch.cuda.synchronize)
    return round(100 * timings["library"].median / timings["ours"].median)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--operations", default=",".join(EPILOGUES), help="comma-separated; all by default")
    parser.add_argument("--out", type=Path, default=tiles.FOLDER, help="where the table goes; the package by default")
    parser.add_argument("--workers", type=int, default=8, help="processes that compile")
    args = parser.parse_args(argv)
    operations = args.operations.split(",")
    if unknown := sorted(set(operations) - set(EPILOGUES)):
        print(f"tune: expected operations of {', '.join(EPILOGUES)}, got {', '.join(unknown)}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("tune: expected a GPU, found none; tables are made on the chip that they are for", file=sys.stderr)
        return 2
    return tune(operations, args.out, args.workers)


def tune(operations: list[str], out: Path, workers: int) -> int:
    import triton

    from tpmp_kernels.bench import provenance
    from tpmp_kernels.kernels.gemm import chip

    arch, _ = chip(torch.device("cuda"))
    where = provenance("cuda", threads=1)
    origin = f"tuned on {where.device}, {where.date[:10]}, Triton {triton.__version__}, {'x'.join(map(str, PROBLEM))}"
    path = out / f"{tiles.table(arch)}.json"
    source = path if path.exists() else tiles.FOLDER / path.name
    table = json.loads(source.read_text())
    for operation in operations:
        seconds = measure(operation, arch, workers)
        if not seconds:
            print(f"tune: no candidate of {operation} fits {arch}", file=sys.stderr)
            return 1
        rows = rows_from(seconds, operation, origin)
        table = merged(table, rows)
        best = min(seconds, key=seconds.__getitem__)
        print(f"{operation}: {len(seconds)} tiles timed; best {json.dumps(asdict(best))}, {seconds[best] * 1e6:.0f} us")
        if operation == "linear":
            table["chip"] = {**table["chip"], "of_library": of_library(best), "origin": f"of_library {origin}"}
        write(table, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
