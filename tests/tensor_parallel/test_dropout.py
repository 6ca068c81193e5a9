"""Dropout masks are functions of key and place: known answers, the same for every cut, statistically independent."""

import itertools
import math

import pytest
import torch
import torch.distributed as dist

from tpmp_kernels.comm import SelfCommunicator, communicator
from tpmp_kernels.tensor_parallel import Dropout, DropoutKey, dropout
from tpmp_kernels.tensor_parallel.dropout import dropout_mask
from tpmp_kernels.tensor_parallel.philox import WORD, matrix_words, philox

KEY = DropoutKey(seed=2**40 + 5, step=3, layer=2, microbatch=1)


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [  # kat_vectors of Random123 1.14, philox4x32 10
        ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((WORD, WORD), (WORD, WORD, WORD, WORD), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers(key, counter, words):
    assert tuple(int(w) for w in philox(key, tuple(torch.tensor([c]) for c in counter))) == words


def words(rows, columns, width, seed=1, stream=(0, 0, 0)):
    blocks = matrix_words(seed, stream, rows=rows, columns=columns, width=width, device="cpu")
    return torch.cat([block for _, block in blocks])


def test_any_block_of_a_matrix_is_cut_out_of_the_whole(monkeypatch):
    whole = words(range(13), range(11), 11)
    assert whole.shape == (13, 11) and whole.min() >= 0 and whole.max() <= WORD and whole.unique().numel() == 143
    monkeypatch.setitem(matrix_words.__globals__["_BLOCK"], "cpu", 4)  # a row, or two, at a time
    for rows, columns in itertools.product(
        (range(13), range(3, 9), range(5, 5)), (range(11), range(5, 8), range(4, 9))
    ):
        for row, block in matrix_words(1, (0, 0, 0), rows=rows, columns=columns, width=11, device="cpu"):
            assert torch.equal(block, whole[row : row + len(block), columns.start : columns.stop])


def test_places_beyond_32_bits_are_other_places():
    near, far = words(range(1), range(8), 8), words(range(2**31, 2**31 + 1), range(8), 8)
    assert not torch.equal(near, far)
    assert torch.equal(far, words(range(2**31, 2**31 + 1), range(8), 8))


def test_nothing_of_the_key_is_ignored():
    keys = [KEY, *(DropoutKey(**{**vars(KEY), name: value + 1}) for name, value in vars(KEY).items())]
    keys.append(DropoutKey(KEY.seed + 2**33, KEY.step, KEY.layer, KEY.microbatch))
    masks = [dropout_mask(torch.Size((64, 64)), 0.5, key) for key in keys]
    n = 64 * 64
    for a, b in itertools.combinations(masks, 2):
        # Independent masks agree in n/2 places with a deviation of sqrt(n)/2; 15 pairs, five deviations.
        assert abs((a == b).sum().item() - n / 2) <= 5 * math.sqrt(n) / 2


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_the_share_of_dropped_elements_is_p(p):
    kept = dropout_mask(torch.Size((512, 512)), p, KEY)
    n = kept.numel()
    assert abs((~kept).sum().item() - p * n) <= 5 * math.sqrt(n * p * (1 - p))
    for dimension in (0, 1):  # no row or column is more or less likely than another: chi square of 512 counts
        counts = (~kept).sum(dimension).double()
        chi = (counts - 512 * p).square().sum() / (512 * p * (1 - p))
        assert abs(chi - 512) <= 5 * math.sqrt(2 * 512)


@pytest.mark.parametrize("shift", [(0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 1)])
def test_neighbours_are_independent(shift):
    kept = dropout_mask(torch.Size((512, 512)), 0.5, KEY).double() * 2 - 1
    product = kept[shift[0] :, shift[1] :] * kept[: 512 - shift[0], : 512 - shift[1]]
    assert abs(product.sum()) <= 5 * math.sqrt(product.numel())


def test_kept_elements_are_scaled_and_dropped_ones_are_zero_in_both_directions():
    x = torch.randn(6, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    kept = dropout_mask(x.shape, 0.25, KEY)
    y = dropout(x, 0.25, KEY)
    assert torch.equal(y, torch.where(kept, x * (1 / 0.75), 0.0))
    y.sum().backward()
    assert torch.equal(x.grad, kept.double() * (1 / 0.75))


def test_what_is_dropped_may_be_anything():
    x = torch.full((64, 64), float("nan"))
    assert torch.equal(dropout(x, 0.5, KEY).isnan(), dropout_mask(x.shape, 0.5, KEY))


def test_extremes():
    x = torch.ones(4, 7, requires_grad=True)
    assert dropout(x, 0.0, KEY) is x and Dropout(0.5).eval()(x, KEY) is x
    y = dropout(x, 1.0, KEY)
    y.sum().backward()
    assert not y.any() and not x.grad.any()
    assert dropout(torch.ones(0, 7), 0.5, KEY).shape == (0, 7)


def run_shards(columns_parallel: bool):
    with communicator(dist.group.WORLD, name="dropout") as comm:
        x = torch.arange(1.0, 1 + 24 * 20).view(24, 20)
        layer = Dropout(0.3, comm, sequence_parallel=not columns_parallel, columns_parallel=columns_parallel)
        mine = x.chunk(comm.size, int(columns_parallel))[comm.rank].clone().requires_grad_()
        y = layer(mine, KEY)
        y.sum().backward()
        return y.detach(), mine.grad


@pytest.mark.parametrize("columns_parallel", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_shards_of_tokens_and_of_columns_have_the_shard_of_the_mask(ranks, size, columns_parallel):
    x = torch.arange(1.0, 1 + 24 * 20).view(2, 12, 20).requires_grad_()
    y = Dropout(0.3)(x, KEY)
    y.sum().backward()
    parts = ranks(size).run(run_shards, columns_parallel)
    for whole, shards in ((y, [part[0] for part in parts]), (x.grad, [part[1] for part in parts])):
        assert torch.equal(torch.cat(shards, int(columns_parallel)), whole.flatten(0, 1))


@pytest.mark.parametrize("p", [-0.1, 1.5, math.nan])
def test_a_p_that_is_no_share_is_refused(p):
    with pytest.raises(ValueError, match=r"Dropout: p must be from 0 to 1, got .*; it is the share of elements"):
        Dropout(p)


@pytest.mark.parametrize("field", ["seed", "step", "layer", "microbatch"])
def test_keys_that_would_run_into_each_other_are_refused(field):
    for value in (-1, 2**64):
        with pytest.raises(ValueError, match=rf"DropoutKey: {field} must be from 0 to \d+, got {value}; count from 0"):
            DropoutKey(**{**vars(KEY), field: value})


def test_a_shard_needs_to_know_where_it_is():
    for flags in ({"sequence_parallel": True}, {"columns_parallel": True}):
        with pytest.raises(ValueError, match="pass at most one of them, and the communicator that cuts x"):
            Dropout(0.5, **flags)
    with pytest.raises(ValueError, match="pass at most one of them"):
        Dropout(0.5, SelfCommunicator(), sequence_parallel=True, columns_parallel=True)
