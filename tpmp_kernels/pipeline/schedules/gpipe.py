"""GPipe (Huang et al., 2019): all forwards, then all backwards. Three ranks, four microbatches:

    rank 0   F0 F1 F2 F3             BW0 BW1 BW2 BW3
    rank 1      F0 F1 F2 F3      BW0 BW1 BW2 BW3
    rank 2         F0 F1 F2 F3 BW0 BW1 BW2 BW3

Every microbatch is in memory when the first backward starts. Backwards run in increasing order, where the paper has
them reversed: gradients then add up in the same order, to the same bits, as in every other schedule.
"""

from tpmp_kernels.pipeline.schedule import Action, Kind, Schedule
from tpmp_kernels.pipeline.schedules.orders import each
from tpmp_kernels.pipeline.schedules.placement import looped


def build(ranks: int, microbatches: int) -> Schedule:
    def order(stage: int) -> tuple[Action, ...]:
        return (*each(Kind.F, stage, range(microbatches)), *each(Kind.BW, stage, range(microbatches)))

    return Schedule("gpipe", looped(ranks), microbatches, tuple(map(order, range(ranks))))


def peak_live(rank: int, ranks: int, microbatches: int) -> int:
    return microbatches
