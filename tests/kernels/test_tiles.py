"""The choice of a tile: pure, integral, within shared memory, and sensible at the ends; and the tables themselves."""

import dataclasses
import json
import random
import subprocess
import sys

import pytest

from tpmp_kernels.kernels import tiles

PLAIN = tiles.Epilogue()
FULL = tiles.Epilogue("gelu", bias=True, residual=True, preact=True)
TABLES = sorted(path.stem for path in tiles.FOLDER.glob("*.json"))


def choose(m, n, k, dtype="bf16", *, operation="linear", arch="sm90", sms=132, epilogue=PLAIN, aligned=True):
    return tiles.tile(
        operation, m, n, k, dtype, arch=arch, sms=sms, epilogue=epilogue, triton_version="3.9.0", aligned=aligned
    )


def test_large_problems_take_the_large_tile_and_small_ones_spread_out():
    assert (choose(8192, 8192, 4096).block_m, choose(8192, 8192, 4096).block_n) == (128, 256)
    assert (choose(64, 1024, 4096).block_m, choose(64, 1024, 4096).block_n) == (64, 64)


def test_a_tile_that_would_spill_is_not_chosen():
    row = next(row for row in tiles.rows_of("sm90") if row.tile.block_n == 256)
    narrow = {"activation": "silu", "residual": True}
    spilling = dataclasses.replace(row, spills=(narrow,))
    for epilogue, fits in ((tiles.Epilogue("silu", residual=True, bias=True), False), (tiles.Epilogue("silu"), True)):
        assert spilling.serves("linear", "bf16", epilogue, (3, 9)) is fits


def test_a_row_serves_its_versions_of_triton_alone():
    row = dataclasses.replace(tiles.rows_of("sm90")[0], since=(3, 7), until=(3, 9))
    assert [row.serves("linear", "bf16", PLAIN, (3, minor)) for minor in (6, 7, 8, 9)] == [False, True, True, False]


def test_operands_that_are_not_aligned_are_loaded_by_elements():
    assert choose(8192, 8192, 4096).loads == "descriptors"
    assert choose(8192, 8192, 4096, arch="sm80").loads == "vectors"
    for arch in ("sm80", "sm90", "sm100", "gfx942"):
        assert choose(8192, 8192, 4096, arch=arch, aligned=False).loads == "scalars"


@pytest.mark.parametrize("arch", ["sm75", "sm80", "sm86", "sm89", "sm90", "sm100", "sm120", "gfx942", "gfx950"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("operation", tiles.OPERATIONS)
def test_every_choice_is_shipped_and_fits_the_chip(operation, dtype, arch):
    rng = random.Random(arch)
    for _ in range(50):
        m, n, k = (rng.choice([0, 1, 17, 128, 1000, 4096, 100_000]) for _ in range(3))
        options = {"operation": operation, "arch": arch, "epilogue": rng.choice([PLAIN, FULL])}
        options["aligned"] = rng.random() < 0.5
        t = choose(m, n, k, dtype, sms=rng.choice([1, 80, 132]), **options)
        assert t in tiles.shipped(dtype=dtype, triton_version="3.9.0", **options)
        assert tiles.shared_estimate(t, operation, dtype) <= tiles.shared_limit(arch)


@pytest.mark.parametrize(
    ("m", "n", "k", "splits"),
    [(8192, 8192, 8192, 1), (1024, 1024, 8192, 4), (256, 256, 1 << 20, 16), (256, 256, 512, 1)],
)
def test_products_of_few_tiles_are_split_along_k(m, n, k, splits):
    tile = tiles.Tile(128, 256, 64, 8, 8, 4, 64, "descriptors")
    assert tiles.splits(m, n, k, tile, 132) == splits


@pytest.mark.parametrize("name", TABLES)
def test_every_row_of_a_table_says_where_it_comes_from(name):
    entries = json.loads((tiles.FOLDER / f"{name}.json").read_text())["rows"]
    for entry in entries:
        assert (
            entry["origin"]
            and set(entry["loads"]) <= set(tiles.LOADS)
            and set(entry["operations"]) <= set(tiles.OPERATIONS)
        )
        assert all(set(each) <= set(tiles.Epilogue.__dataclass_fields__) for each in entry.get("spills", ()))
    assert TABLES == ["gfx942", "sm100", "sm80", "sm90"]


def test_the_choice_needs_neither_torch_nor_triton_and_is_the_same_in_another_process():
    program = (
        "import sys; from tpmp_kernels.kernels import tiles as t;"
        "e = t.Epilogue('silu');"
        "print(t.tile('linear', 1000, 3000, 512, 'bf16', arch='sm90', sms=132, epilogue=e, triton_version='3.6.0'));"
        "assert 'torch' not in sys.modules and 'triton' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    expected = tiles.tile(
        "linear", 1000, 3000, 512, "bf16", arch="sm90", sms=132, epilogue=tiles.Epilogue("silu"), triton_version="3.6.0"
    )
    assert done.stdout.strip() == str(expected), done.stderr
