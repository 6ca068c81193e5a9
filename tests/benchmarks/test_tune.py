"""Tuning without a chip: which tiles are tried, which of them compile, and how timings become rows of a table."""

import json

import pytest

from tpmp_kernels.kernels import tiles

pytest.importorskip("triton")

from benchmarks import gemms, tune

LARGE, SMALL = (
    tiles.Tile(*block, 64, 8, 8, 4, 64, "descriptors", persistent=True, flatten=True)
    for block in ((128, 256), (128, 128))
)


@pytest.mark.parametrize("arch", ["sm80", "sm90", "sm100", "gfx942"])
@pytest.mark.parametrize("operation", tune.EPILOGUES)
def test_candidates_fit_and_are_few(operation, arch):
    tried = tune.candidates(operation, arch)
    assert len(set(tried)) == len(tried) and 10 <= len(tried) <= 200
    assert all(tiles.shared_estimate(tile, operation, "bf16") <= tiles.shared_limit(arch) for tile in tried)


@pytest.mark.full
@pytest.mark.parametrize("operation", gemms.EPILOGUES)
def test_a_tile_that_the_chip_cannot_hold_is_dropped(operation):
    fits = tiles.Tile(64, 64, 64, 8, 4, 4, 64, "descriptors")
    assert tune.compiles(operation, "sm90", fits)
    assert not tune.compiles(operation, "sm90", tiles.Tile(128, 128, 128, 8, 8, 5, 64, "descriptors"))


def test_the_best_of_each_block_becomes_a_row_and_the_rest_of_the_table_stays(tmp_path, monkeypatch):
    from dataclasses import replace

    slower = replace(LARGE, flatten=False)
    rows = tune.rows_from({SMALL: 1.2e-3, slower: 1.1e-3, LARGE: 1.0e-3}, "linear", "a test")
    assert [(row["block"], row["cost"], row["flatten"]) for row in rows] == [
        ([128, 256, 64], 100, True),
        ([128, 128, 64], 120, True),
    ]
    before = json.loads((tiles.FOLDER / "sm90.json").read_text())
    after = tune.merged(before, rows)
    tune.write(after, tmp_path / "sm90.json")
    assert json.loads((tmp_path / "sm90.json").read_text()) == after
    gone = [row for row in before["rows"] if "linear" in row["operations"] and row["loads"] == ["descriptors"]]
    for row in gone:
        rest = [each for each in row["operations"] if each != "linear"]
        assert not rest or {**row, "operations": rest} in after["rows"]
    assert [row for row in before["rows"] if row not in gone] == [
        row for row in after["rows"] if row in before["rows"]
    ]  # fmt: skip

    monkeypatch.setattr(tiles, "FOLDER", tmp_path)
    tiles.rows_of.cache_clear()
    try:
        chosen = tiles.shipped(
            "linear", "bf16", arch="sm90", epilogue=tiles.Epilogue(), triton_version="3.9.0", aligned=True
        )
    finally:
        tiles.rows_of.cache_clear()
    assert chosen == [LARGE, SMALL]


def test_without_a_gpu_it_says_so_and_leaves_the_tables(capsys, tmp_path):
    assert tune.main(["--out", str(tmp_path)]) == 2
    assert "expected a GPU, found none" in capsys.readouterr().err
    assert tune.main(["--operations", "attention"]) == 2
    assert "got attention" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
