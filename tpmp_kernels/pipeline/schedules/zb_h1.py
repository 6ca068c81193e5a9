"""ZB-H1 (Qi et al., 2023, "Zero Bubble Pipeline Parallelism"): 1F1B whose weight gradients wait to fill the bubble.

Three ranks, four microbatches:

    rank 0   F0 F1 F2       B0 W0 F3 B1 W1 B2 W2 B3 W3
    rank 1      F0 F1    B0 F2 B1 W0 F3 B2 W1 B3 W2 W3
    rank 2         F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3

The rank before needs the input gradient B alone, which leaves as soon as it is there and not after W as well. W comes s
turns late on stage s, which evens the memory out: every rank keeps p microbatches, as only rank 0 does in 1F1B.
From p microbatches on, the bubble is (p-1) max(F, B, F+B-W), where that of 1F1B is (p-1) (F+B+W). The paper gives
F+B-W; where W > F, no order with p microbatches in memory reaches it: rank 0 has nothing to do until its first B.
"""

from tpmp_kernels.pipeline.schedule import Action, Kind, Schedule
from tpmp_kernels.pipeline.schedules.orders import each, weave
from tpmp_kernels.pipeline.schedules.placement import looped


def build(ranks: int, microbatches: int) -> Schedule:
    orders = (order(stage, microbatches, warm_up=ranks - 1 - stage, lag=stage) for stage in range(ranks))
    return Schedule("zb-h1", looped(ranks), microbatches, tuple(orders))


def order(stage: int, microbatches: int, *, warm_up: int, lag: int) -> tuple[Action, ...]:
    """F, B, W in turn after `warm_up` forwards, and each W `lag` turns after its B."""
    forwards, backwards, weights = (each(kind, stage, range(microbatches)) for kind in (Kind.F, Kind.B, Kind.W))
    return (*forwards[:warm_up], *weave(forwards[warm_up:], backwards, [None] * lag + weights))


def peak_live(rank: int, ranks: int, microbatches: int) -> int:
    return min(microbatches, ranks)
