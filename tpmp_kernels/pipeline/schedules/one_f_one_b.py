"""1F1B (PipeDream-Flush; Narayanan et al., 2021): as few forwards as fill the pipe, then one backward for each forward.

Three ranks, four microbatches:

    rank 0   F0 F1 F2         BW0 F3  BW1     BW2     BW3
    rank 1      F0 F1     BW0 F2  BW1 F3  BW2     BW3
    rank 2         F0 BW0 F1  BW1 F2  BW2 F3  BW3

The bubble of GPipe, but stage s keeps at most p - s microbatches in memory, however many there are.
"""

from tpmp_kernels.pipeline.schedule import Action, Kind, Schedule
from tpmp_kernels.pipeline.schedules.orders import each, weave
from tpmp_kernels.pipeline.schedules.placement import looped


def build(ranks: int, microbatches: int) -> Schedule:
    orders = (order(stage, microbatches, warm_up=ranks - 1 - stage) for stage in range(ranks))
    return Schedule("1f1b", looped(ranks), microbatches, tuple(orders))


def order(stage: int, microbatches: int, *, warm_up: int) -> tuple[Action, ...]:
    forwards = each(Kind.F, stage, range(microbatches))
    backwards = each(Kind.BW, stage, range(microbatches))
    return (*forwards[:warm_up], *weave(forwards[warm_up:], backwards))


def peak_live(rank: int, ranks: int, microbatches: int) -> int:
    return min(microbatches, ranks - rank)
