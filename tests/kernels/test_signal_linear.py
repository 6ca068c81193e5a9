"""The GEMM that signals: how chunks are cut, what it refuses, and its numbers and order in Triton's interpreter."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tpmp_kernels.kernels import tiles

pytest.importorskip("triton")

from interpreted import outcomes
from signal_cases import CASES

from tpmp_kernels.kernels.signal_linear import chunk_rows, expected, signal_linear, signal_tile

PROGRAM = Path(__file__).parent / "signal_cases.py"
SAMPLE = ["wait", "call", *random.Random(3).sample([name for name in CASES if "-" in name], 5)]
TILE = tiles.Tile(128, 256, 64, 8, 8, 4, 64, "descriptors", persistent=True)


@pytest.fixture(scope="module")
def sample() -> dict[str, str]:
    return outcomes(PROGRAM, SAMPLE)


@pytest.fixture(scope="module")
def rest() -> dict[str, str]:
    return outcomes(PROGRAM, [name for name in CASES if name not in SAMPLE])


@pytest.mark.parametrize("name", SAMPLE)
def test_interpreter(sample, name):
    assert sample[name] == "ok", sample[name]


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in CASES if name not in SAMPLE])
def test_interpreter_full(rest, name):
    assert rest[name] == "ok", rest[name]


@pytest.mark.parametrize("m", [1, 127, 128, 129, 1000, 1024, 1152, 8191, 2**30 + 1])
@pytest.mark.parametrize("chunks", [1, 2, 3, 7, 8, 64])
def test_chunks_are_even_whole_row_blocks_in_order_and_no_more_than_there_are(m, chunks):
    rows, block = chunk_rows(m, chunks, TILE), TILE.block_m
    assert [each.start for each in rows] == [0, *(each.stop for each in rows[:-1])]
    assert rows[-1].stop == m
    assert all(each.stop % block == 0 for each in rows[:-1])
    heights = [-(-(each.stop - each.start) // block) for each in rows]
    assert len(rows) == min(chunks, -(-m // block))
    assert heights == sorted(heights, reverse=True), "the last has nothing to hide under"
    assert heights[0] - heights[-1] <= 1
    assert expected(m, 1000, chunks, TILE) == [4 * height for height in heights]


def test_nothing_has_no_chunks():
    assert chunk_rows(0, 8, TILE) == []
    assert expected(0, 1000, 8, TILE) == []
    assert expected(1000, 0, 2, TILE) == [0, 0]


def test_its_tile_is_the_plain_one_for_the_multiprocessors_that_are_left():
    x, weight = (torch.empty(rows, 4096, dtype=torch.bfloat16) for rows in (4096, 8192))
    tile = signal_tile(x, weight)
    assert (tile.persistent, tile.flatten) == (True, False)
    problem = {"dtype": "bf16", "arch": "sm90", "epilogue": tiles.Epilogue(), "triton_version": "3.9.0"}
    for reserved in (0, 100, 131):
        plain = tiles.tile("linear", 4096, 8192, 4096, sms=132 - reserved, **problem)
        assert signal_tile(x, weight, reserved_sms=reserved) == replace(plain, persistent=True, flatten=False)


GOOD = {
    "x": torch.zeros(256, 16), "weight": torch.zeros(8, 16), "out": torch.zeros(256, 8),
    "counters": torch.zeros(2, dtype=torch.int32), "chunks": 2, "reserved_sms": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"x": torch.zeros(2, 128, 16)}, ValueError, r"got \[2, 128, 16\] and \[8, 16\]; flatten the tokens"),
        ({"weight": torch.zeros(8, 17)}, ValueError, r"got \[256, 16\] and \[8, 17\]"),
        ({"out": torch.zeros(256, 9)}, ValueError, r"contiguous \[256, 8\], got \[256, 9\]"),
        ({"out": torch.zeros(8, 256).t()}, ValueError, r"strides \[1, 256\]; pass x.new_empty\(256, 8\)"),
        ({"weight": torch.zeros(8, 16).bfloat16()}, TypeError, "got torch.bfloat16 and torch.float32; cast"),
        ({"out": torch.zeros(256, 8).bfloat16()}, TypeError, "got torch.float32 and torch.bfloat16; cast"),
        ({"counters": torch.zeros(2)}, ValueError, r"int32 vector, got torch.float32 \[2\]; pass torch.zeros"),
        ({"counters": torch.zeros(4, dtype=torch.int32)[::2]}, ValueError, "counters must be a contiguous"),
        ({"counters": torch.zeros(1, dtype=torch.int32)}, ValueError, "2 chunks need as many counters, got 1"),
        ({"chunks": 0}, ValueError, "at least 1 chunk.* got 0 chunks and reserved_sms=0"),
        ({"reserved_sms": 132}, ValueError, "0 <= reserved_sms < 132, got 2 chunks and reserved_sms=132"),
        ({"reserved_sms": -1}, ValueError, "reserved_sms=-1"),
        ({name: torch.zeros(GOOD[name].shape).double() for name in ("x", "weight", "out")}, TypeError, "bf16, fp16"),
    ],
)  # fmt: skip
def test_refusals(changed, error, words):
    with pytest.raises(error, match=words):
        signal_linear(**{**GOOD, **changed})
