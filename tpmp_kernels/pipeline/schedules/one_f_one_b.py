"""1F1B (PipeDream-Flush; Narayanan et al., 2021): as few forwards as fill the pipe, then one backward for each forward.

Three stages, four microbatches:

    rank 0   F0 F1 F2         BW0 F3  BW1     BW2     BW3
    rank 1      F0 F1     BW0 F2  BW1 F3  BW2     BW3
    rank 2         F0 BW0 F1  BW1 F2  BW2 F3  BW3

The bubble of GPipe, but stage s keeps at most p - s microbatches in memory, however many there are.
"""

from tpmp_kernels.pipeline.schedule import Action, Kind, Schedule


def build(ranks: int, microbatches: int) -> Schedule:
    def order(stage: int):
        warm_up = min(microbatches, ranks - 1 - stage)
        yield from (Action(Kind.F, stage, i) for i in range(warm_up))
        for i in range(warm_up, microbatches):
            yield Action(Kind.F, stage, i)
            yield Action(Kind.BW, stage, i - warm_up)
        yield from (Action(Kind.BW, stage, i) for i in range(microbatches - warm_up, microbatches))

    actions = tuple(tuple(order(stage)) for stage in range(ranks))
    return Schedule("1f1b", tuple(range(ranks)), microbatches, actions)


def peak_live(rank: int, ranks: int, microbatches: int) -> int:
    return min(microbatches, ranks - rank)
