"""GPipe (Huang et al., 2019): all forwards, then all backwards. Three stages, four microbatches:

    rank 0   F0 F1 F2 F3             BW0 BW1 BW2 BW3
    rank 1      F0 F1 F2 F3      BW0 BW1 BW2 BW3
    rank 2         F0 F1 F2 F3 BW0 BW1 BW2 BW3

Every microbatch is in memory when the first backward starts. Backwards run in increasing order, where the paper has
them reversed: gradients then add up in the same order, to the same bits, as in every other schedule.
"""

from tpmp_kernels.pipeline.schedule import Action, Kind, Schedule


def build(ranks: int, microbatches: int) -> Schedule:
    def order(stage: int):
        yield from (Action(Kind.F, stage, i) for i in range(microbatches))
        yield from (Action(Kind.BW, stage, i) for i in range(microbatches))

    actions = tuple(tuple(order(stage)) for stage in range(ranks))
    return Schedule("gpipe", tuple(range(ranks)), microbatches, actions)


def peak_live(rank: int, ranks: int, microbatches: int) -> int:
    return microbatches
