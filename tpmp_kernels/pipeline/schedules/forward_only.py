"""Forwards alone, for validation: nothing is kept for a backward that does not come. Three ranks, four microbatches:

rank 0   F0 F1 F2 F3
rank 1      F0 F1 F2 F3
rank 2         F0 F1 F2 F3
"""

from tpmp_kernels.pipeline.schedule import Kind, Schedule
from tpmp_kernels.pipeline.schedules.orders import each
from tpmp_kernels.pipeline.schedules.placement import looped


def build(ranks: int, microbatches: int) -> Schedule:
    actions = tuple(tuple(each(Kind.F, stage, range(microbatches))) for stage in range(ranks))
    return Schedule("forward-only", looped(ranks), microbatches, actions, backward=False)


def peak_live(rank: int, ranks: int, microbatches: int) -> int:
    return 1
