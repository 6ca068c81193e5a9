"""V-Min (Qi et al., 2024): a third of the memory of 1F1B, for a bubble that is still smaller than its.

Two ranks, stages 0 and 3 on rank 0 and 1 and 2 on rank 1, four microbatches:

    rank 0   0F0         3F0 3B0 0F1 3W0 0B0 0W0 3F1 3B1 0F2 3W1 0B1 0W1 3F2 3B2 0F3 3W2 0B2 0W2 3F3 3B3 3W3     0B3 0W3
    rank 1       1F0 2F0         2B0 1B0 1F1 2F1 2W0 1W0 2B1 1B1 1F2 2F2 2W1 1W1 2B2 1B2 1F3 2F3 2W2 1W2 2B3 1B3 2W3 1W3

The V of v_pattern.py with slopes (1, 1, 1, 1): every pass follows its input at once, so an activation lives as short as
it can, and a rank holds 4 p / 6 of a chunk and one or two more for the W that wait; greedy.py puts each W where it
delays nothing. The paper's bubble is 2 p / (3 m) of the ideal time where F = B = W; this order stays below.
"""

from tpmp_kernels.pipeline.costs import Costs
from tpmp_kernels.pipeline.schedule import Schedule
from tpmp_kernels.pipeline.schedules.greedy import Rule, Way, place
from tpmp_kernels.pipeline.schedules.placement import folded
from tpmp_kernels.pipeline.schedules.v_pattern import forwards_and_backwards


def build(ranks: int, microbatches: int) -> Schedule:
    way = Way(ranks, microbatches, Costs())
    orders = forwards_and_backwards(ranks, microbatches, slopes=(1, 1, 1, 1))
    placed = place(way, orders, _limit(ranks), Rule())
    return Schedule("v-min", folded(ranks), microbatches, way.actions(placed.orders))


def _limit(ranks: int) -> int:
    return 2 * ((ranks + 4) // 3)


def peak_live(rank: int, ranks: int, microbatches: int) -> int:
    return min(2 * microbatches, _limit(ranks))
