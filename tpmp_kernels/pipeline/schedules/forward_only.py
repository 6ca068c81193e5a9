"""Forwards alone, for validation: nothing is kept for a backward that does not come. Three stages, four microbatches:

rank 0   F0 F1 F2 F3
rank 1      F0 F1 F2 F3
rank 2         F0 F1 F2 F3
"""

from tpmp_kernels.pipeline.schedule import Action, Kind, Schedule


def build(ranks: int, microbatches: int) -> Schedule:
    actions = tuple(tuple(Action(Kind.F, stage, i) for i in range(microbatches)) for stage in range(ranks))
    return Schedule("forward-only", tuple(range(ranks)), microbatches, actions, backward=False)


def peak_live(rank: int, ranks: int, microbatches: int) -> int:
    return 1
