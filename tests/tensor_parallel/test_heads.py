"""Heads over ranks: which rank holds which, and what is refused."""

import pytest

from tpmp_kernels.comm import SelfCommunicator
from tpmp_kernels.tensor_parallel import ColumnParallelLinear, head_shard, replicas_of


def group(size: int) -> SelfCommunicator:
    comm = SelfCommunicator()
    comm.size = size
    return comm


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "shard"),
    [
        (8, 8, 4, (2, 2, 1)),
        (8, 4, 4, (2, 1, 1)),
        (8, 2, 4, (2, 1, 2)),
        (8, 1, 4, (2, 1, 4)),
        (12, 6, 3, (4, 2, 1)),
        (12, 1, 12, (1, 1, 12)),
        (8, 2, 1, (8, 2, 1)),
    ],
)
def test_shards(heads, kv_heads, size, shard):
    assert head_shard(heads, kv_heads, group(size)) == shard


@pytest.mark.parametrize(("kv_heads", "size"), [(1, 4), (2, 4), (4, 4), (2, 8), (6, 3)])
def test_a_rank_holds_the_key_and_value_heads_of_its_query_heads(kv_heads, size):
    heads = 24
    own = head_shard(heads, kv_heads, group(size))
    for rank in range(size):
        needed = {head * kv_heads // heads for head in range(rank * own.heads, (rank + 1) * own.heads)}
        first = rank // own.replicas * own.kv_heads
        assert needed == set(range(first, first + own.kv_heads))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "sentence"),
    [
        (12, 3, 2, "kv_heads is 3 and tp=2, neither divides the other; use tp in [1, 3, 6, 12] or change kv_heads"),
        (12, 4, 6, "kv_heads is 4 and tp=6, neither divides the other; use tp in [1, 2, 4, 12] or change kv_heads"),
        (12, 4, 8, "heads is 12, not divisible by tp=8; use tp in [1, 2, 3, 4, 6] or change heads"),
    ],
)
def test_what_divides_neither_way_is_refused(heads, kv_heads, size, sentence):
    with pytest.raises(ValueError) as caught:
        head_shard(heads, kv_heads, group(size))
    assert str(caught.value) == sentence


def test_replicated_columns_say_so():
    weight = ColumnParallelLinear(8, 6, group(4), replicas=2).weight
    assert weight.shape == (3, 8) and replicas_of(weight) == weight.tp_partial_grad == 2
    assert not hasattr(ColumnParallelLinear(8, 8, group(4)).weight, "tp_partial_grad")
    with pytest.raises(ValueError, match="replicas is 3, which does not divide tp=4; pass how many neighbours"):
        ColumnParallelLinear(8, 6, group(4), replicas=3)
