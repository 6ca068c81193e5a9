"""Eager 1F1B (Zhuang et al., 2022): 1F1B with twice the warm-up, so that transfers travel behind other microbatches.

Three ranks, six microbatches; an F, a BW and a transfer take one column each:

    rank 0   F0 F1 F2 F3 F4               BW0 F5 BW1    BW2    BW3 BW4 BW5
    rank 1         F0 F1 F2        BW0 F3 BW1 F4 BW2 F5 BW3    BW4 BW5
    rank 2               F0 BW0 F1 BW1 F2 BW2 F3 BW3 F4 BW4 F5 BW5

1F1B takes 26 columns: with every microbatch, neighbours wait for what the other has only just sent. Here another one is
always there, and transfers of a time t up to that of an F or a BW show only while the pipe fills and drains: the bubble
is (p-1) (F + BW + 2t). For that, stage s keeps up to 2(p-1-s) + 1 microbatches in memory, where 1F1B keeps p - s.
"""

from tpmp_kernels.pipeline.schedule import Schedule
from tpmp_kernels.pipeline.schedules.one_f_one_b import order
from tpmp_kernels.pipeline.schedules.placement import looped


def build(ranks: int, microbatches: int) -> Schedule:
    orders = (order(stage, microbatches, warm_up=2 * (ranks - 1 - stage)) for stage in range(ranks))
    return Schedule("1f1b-eager", looped(ranks), microbatches, tuple(orders))


def peak_live(rank: int, ranks: int, microbatches: int) -> int:
    return min(microbatches, 2 * (ranks - 1 - rank) + 1)
