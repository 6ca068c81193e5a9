"""ops.rope and ops.rope_table: Llama's convention by its definition, any strides and positions, what they refuse."""

import math
import random

import pytest
import torch
from bounds import UNIT, assert_within
from neighbour_bounds import rope_bound

from tpmp_kernels import ops, reference

F64 = torch.float64
each_dtype = pytest.mark.parametrize("dtype", UNIT, ids=str)


def turned(x: list[float], position: int, frequencies: list[float]) -> list[float]:
    """One head by the definition: elements i and i + R/2 are one complex number, turned by position * frequency."""
    half = len(frequencies)
    angles = [frequency * position for frequency in frequencies]
    pairs = [complex(x[i], x[i + half]) * complex(math.cos(a), math.sin(a)) for i, a in enumerate(angles)]
    return [z.real for z in pairs] + [z.imag for z in pairs] + x[2 * half :]


@pytest.mark.parametrize("room", [ops, reference], ids=["ops", "reference"])
@pytest.mark.parametrize("rest", [0, 3])
def test_every_head_is_turned_as_the_definition_says(room, rest):
    q, k = torch.randn(2, 5, 3, 6 + rest, dtype=F64), torch.randn(2, 5, 1, 6 + rest, dtype=F64)
    frequencies = [100.0 ** (-2 * i / 6) for i in range(3)]
    ids = torch.tensor([[0, 1, 2, 3, 4], [7, 7, 0, 6, 1]])
    for got, x in zip(room.rope(q, k, room.rope_table(8, 6, theta=100.0, dtype=F64), ids), (q, k), strict=True):
        for b, s, h in ((b, s, h) for b in range(2) for s in range(5) for h in range(x.shape[2])):
            expected = turned(x[b, s, h].tolist(), int(ids[b, s]), frequencies)
            torch.testing.assert_close(got[b, s, h], torch.tensor(expected, dtype=F64), rtol=0, atol=1e-14)


@each_dtype
@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(s, marks=pytest.mark.full) for s in range(3, 100))])
def test_rope_is_within_its_bound(dtype, seed):
    """Also backward, which is the way back."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, sequence, half, rest = (
        rng.choice([0, 1, 3]),
        rng.choice([0, 1, 7, 31]),
        rng.choice([1, 3, 16]),
        rng.choice([0, 5]),
    )

    def draw(heads: int) -> torch.Tensor:
        order = [*rng.sample(range(3), 3), 3]
        shape = (batch, sequence, heads, 2 * half + rest)
        drawn = torch.randn([shape[i] for i in order], generator=generator, dtype=F64).to(dtype)
        return drawn.permute([order.index(i) for i in range(4)])

    q, k = draw(rng.choice([1, 5, 8])), draw(rng.choice([1, 2]))
    table = ops.rope_table(50, 2 * half, dtype=rng.choice([torch.float32, F64]) if dtype is F64 else torch.float32)
    shape = rng.choice([None, [sequence], [batch, sequence]])
    ids = None if shape is None else torch.randint(50, shape, generator=generator)
    results = ops.rope(q.requires_grad_(), k.requires_grad_(), table, ids)
    upstream = [draw(t.shape[2]) for t in results]
    grads = torch.autograd.grad(results, [q, k], upstream)
    for inverse, turned_ones, sources in ((False, results, (q, k)), (True, grads, upstream)):
        for got, x in zip(turned_ones, sources, strict=True):
            assert got.dtype == dtype and got.shape == x.shape
            assert_within(got.detach(), *rope_bound(x.detach(), table, ids, inverse=inverse))


def test_heads_in_front_of_the_sequence_give_the_same_bits():
    """Hugging Face's layout, [B, H, S, D] transposed: no copy is asked of the caller."""
    q, k, table = torch.randn(2, 4, 5, 6), torch.randn(2, 2, 5, 6), ops.rope_table(5, 6)
    got = ops.rope(q.transpose(1, 2), k.transpose(1, 2), table)
    expected = ops.rope(q.transpose(1, 2).contiguous(), k.transpose(1, 2).contiguous(), table)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_scores_depend_on_the_distance_alone():
    q, k = torch.randn(1, 1, 1, 64, dtype=F64), torch.randn(1, 1, 1, 64, dtype=F64)
    table = ops.rope_table(2000, 64, dtype=F64)

    def score(i: int, j: int) -> torch.Tensor:
        return (ops.rope(q, k, table, torch.tensor([i]))[0] * ops.rope(q, k, table, torch.tensor([j]))[1]).sum()

    torch.testing.assert_close(score(1900, 1893), score(7, 0), rtol=0, atol=1e-12)


def scaled(frequency: float, s: ops.Llama3Scaling) -> float:
    """Llama 3.1's rule in the branches of its paper code."""
    wavelength = 2 * math.pi / frequency
    if wavelength < s.original_positions / s.high_freq_factor:
        return frequency
    if wavelength > s.original_positions / s.low_freq_factor:
        return frequency / s.factor
    smooth = (s.original_positions / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    return (1 - smooth) * frequency / s.factor + smooth * frequency


@pytest.mark.parametrize("scaling", [None, ops.Llama3Scaling(), ops.Llama3Scaling(factor=32.0, original_positions=64)])
def test_the_table_is_cos_and_sin_of_the_scaled_angles(scaling):
    """To the last digit of fp32, also at position 131071, where an fp32 angle is off by a hundredth."""
    dim, theta, positions = 128, 500000.0, 131072
    frequencies = [theta ** (-2 * i / dim) for i in range(dim // 2)]
    frequencies = frequencies if scaling is None else [scaled(f, scaling) for f in frequencies]
    table = ops.rope_table(positions, dim, theta=theta, scaling=scaling)
    assert table.shape == (positions, dim) and table.dtype == torch.float32
    for position in (0, 1, 8191, positions - 1):
        angles = [f * position for f in frequencies]
        exact = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        # fp64 rounds an angle of 131071 by 2^-37 at most.
        torch.testing.assert_close(table[position].double(), torch.tensor(exact, dtype=F64), rtol=2**-23, atol=2**-34)


def test_the_rule_of_llama_3_has_all_three_ranges():
    """Otherwise the comparison above would not see them."""
    scaling, frequencies = ops.Llama3Scaling(), [500000.0 ** (-2 * i / 128) for i in range(64)]
    ratios = [scaled(f, scaling) / f for f in frequencies]
    assert 1.0 in ratios and 1 / 8 in ratios and any(1 / 8 < r < 1 for r in ratios)


def test_the_table_and_the_positions_alone_are_kept():
    kept, table, ids = [], ops.rope_table(9, 6), torch.tensor([3, 1, 2])
    q = torch.randn(2, 3, 4, 6, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        ops.rope(q, q.detach(), table, ids)
    assert sorted(kept) == sorted([table.data_ptr(), ids.data_ptr()])


def test_autocast_leaves_the_table_alone():
    q, table = torch.randn(2, 5, 3, 8).bfloat16(), ops.rope_table(5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ops.rope(q, q, table)
        mixed, _ = ops.rope(q, q.float(), table)
    assert all(torch.equal(a, b) for a, b in zip(got, ops.rope(q, q, table), strict=True))
    assert mixed.dtype == torch.float32


Q, K, TABLE, IDS = torch.zeros(2, 5, 4, 8), torch.zeros(2, 5, 2, 8), ops.rope_table(9, 8), torch.arange(5)
REFUSED = [
    (lambda: ops.rope_table(4, 7), ValueError, "rope_table: positions must be at least 0, and dim even"),
    (lambda: ops.rope_table(-1, 8), ValueError, "rope_table: positions must be at least 0, and dim even"),
    (lambda: ops.rope(Q, K[..., :6], TABLE), ValueError, "rope: q and k must have shapes [B, S, Hq, D] and"),
    (lambda: ops.rope(Q, K[:, :4], TABLE), ValueError, "rope: q and k must have shapes"),
    (lambda: ops.rope(Q[0], K[0], TABLE), ValueError, "rope: q and k must have shapes"),
    (
        lambda: ops.rope(Q, K, ops.rope_table(9, 10)),
        ValueError,
        "rope: table must have shape [P, R] with R even and",
    ),
    (lambda: ops.rope(Q, K, TABLE[:, :3]), ValueError, "rope: table must have shape [P, R] with R even"),
    (lambda: ops.rope(Q, K, TABLE[:4]), ValueError, "rope: table has 4 positions but the sequence has 5; make"),
    (lambda: ops.rope(Q, K, TABLE.bfloat16()), TypeError, "rope: table must be float32, or float64 for float64 q"),
    (lambda: ops.rope(Q, K, TABLE.double()), TypeError, "rope: table must be float32, or float64 for float64 q"),
    (lambda: ops.rope(Q, K, TABLE.to("meta")), ValueError, "rope: table is on meta but q is on cpu"),
    (lambda: ops.rope(Q, K.double(), TABLE), TypeError, "rope: k has dtype torch.float64 but q has torch.float32"),
    (lambda: ops.rope(Q, K, TABLE, IDS.int()), TypeError, "rope: position_ids must be int64, got torch.int32"),
    (lambda: ops.rope(Q, K, TABLE, IDS[:4]), ValueError, "rope: position_ids must have shape [5] or [2, 5], got [4]"),
    (lambda: ops.rope(Q, K, TABLE, IDS.to("meta")), ValueError, "rope: position_ids is on meta but q is on cpu"),
    (lambda: ops.rope(Q, K, TABLE, [0, 1]), TypeError, "rope: position_ids must be a Tensor, got list"),
    (lambda: ops.rope(Q, K, TABLE, IDS + 5), ValueError, "rope: position_ids must lie in 0..8, the rows of the table"),
    (lambda: ops.rope(Q, K, TABLE, IDS - 1), ValueError, "rope: position_ids must lie in 0..8, the rows of the table"),
]


@pytest.mark.parametrize(("call", "kind", "text"), REFUSED)
def test_refused_in_one_sentence(call, kind, text):
    with pytest.raises(kind) as error:
        call()
    assert str(error.value).startswith(text) and "\n" not in str(error.value)
