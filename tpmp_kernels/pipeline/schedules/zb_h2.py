"""ZB-H2 (Qi et al., 2023, "Zero Bubble Pipeline Parallelism"): ZB-H1 with twice the warm-up and twice the wait of W.

Three ranks, six microbatches:

    rank 0   F0 F1 F2 F3 F4 B0 W0 F5 B1 W1 B2 W2 B3 W3 B4 W4 B5 W5
    rank 1      F0 F1 F2 B0 F3 B1 F4 B2 W0 F5 B3 W1 B4 W2 B5 W3 W4 W5
    rank 2         F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 W0 F5 B5 W1 W2 W3 W4 W5

Enough forwards to be busy until the first B arrives, at the price of 2p - 1 microbatches in memory. From 2p - 1 on, the
bubble between the first and the last action of a rank is (p-1) max(0, B-F, F+B-2W), none for equal times; the paper
gives F+B-2W. Ranks start one after the other and end one after the other, so it pays only where the optimizer does not
make them wait for each other; if it does, the bubble is (p-1) F at least. With fewer microbatches, take ZB-H1.
"""

from tpmp_kernels.pipeline.schedule import Schedule
from tpmp_kernels.pipeline.schedules.placement import looped
from tpmp_kernels.pipeline.schedules.zb_h1 import order


def build(ranks: int, microbatches: int) -> Schedule:
    orders = (order(stage, microbatches, warm_up=2 * (ranks - 1 - stage), lag=2 * stage) for stage in range(ranks))
    return Schedule("zb-h2", looped(ranks), microbatches, tuple(orders))


def peak_live(rank: int, ranks: int, microbatches: int) -> int:
    return min(microbatches, 2 * ranks - 1)
