"""V-Half (Qi et al., 2024): half of the memory of 1F1B, for a bubble of about half of its.

Two ranks, stages 0 and 3 on rank 0 and 1 and 2 on rank 1, four microbatches:

    rank 0   0F0         3F0 3B0 0F1 3W0     3F1 3B1 0F2 0B0 3W1 0W0 3F2 3B2 0F3 0B1 3W2 0W1 3F3 3B3 0B2 3W3 0B3 0W2 0W3
    rank 1       1F0 2F0         2B0 1F1 2F1 1B0 2W0 2B1 1F2 1W0 2F2 1B1 2W1 2B2 1F3 1W1 2F3 1B2 2W2 2B3 1B3 1W2 2W3 1W3

The V of v_pattern.py with slopes (2, 1, 2, 1), which holds (2 + 1 + 2 + 1) p / 6 chunk activations and one or two more
for the W that wait; greedy.py puts each W where it delays nothing. The paper's bubble is p / (2 m) of the ideal time
where F = B = W; this order stays below.
"""

from tpmp_kernels.pipeline.costs import Costs
from tpmp_kernels.pipeline.schedule import Schedule
from tpmp_kernels.pipeline.schedules.greedy import Rule, Way, place
from tpmp_kernels.pipeline.schedules.placement import folded
from tpmp_kernels.pipeline.schedules.v_pattern import forwards_and_backwards


def build(ranks: int, microbatches: int) -> Schedule:
    way = Way(ranks, microbatches, Costs())
    orders = forwards_and_backwards(ranks, microbatches, slopes=(2, 1, 2, 1))
    placed = place(way, orders, _limit(ranks), Rule())
    return Schedule("v-half", folded(ranks), microbatches, way.actions(placed.orders))


def _limit(ranks: int) -> int:
    return 2 * ((ranks + 2) // 2)


def peak_live(rank: int, ranks: int, microbatches: int) -> int:
    return min(2 * microbatches, _limit(ranks))
