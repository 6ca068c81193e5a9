"""The messages of a schedule by number, which lowering, proof and simulation use in place of names.

A message is what one compute hands to the next stage, also where that is on the same rank. Those of payload F (an
activation) come first, then those of payload B (an input gradient), each by producing stage and then microbatch.
"""

from typing import NamedTuple

from tpmp_kernels.pipeline.schedule import Kind, Schedule


class Route(NamedTuple):
    """What a compute of one kind and stage consumes and produces.

    source, target: the message of microbatch 0, or None; add the microbatch. sender, receiver: the other rank, or None
    where the message stays on its rank.
    """

    source: int | None
    sender: int | None
    target: int | None
    receiver: int | None


def routes(schedule: Schedule) -> dict[Kind, list[Route]]:
    """[kind][stage] for F, B, W, BW and PAIR."""
    stages, microbatches, placement = schedule.stages, schedule.microbatches, schedule.placement

    def other(stage: int, neighbour: int) -> int | None:
        return None if placement[neighbour] == placement[stage] else placement[neighbour]

    def chain(first: int, upward: int) -> list[Route]:
        """Stage after stage, upward (+1) or downward (-1), whose messages are numbered from `first` on."""
        row = []
        for stage in range(stages):
            before, after = stage - upward, stage + upward
            source = (first + before * microbatches, other(stage, before)) if 0 <= before < stages else (None, None)
            target = (first + stage * microbatches, other(stage, after)) if 0 <= after < stages else (None, None)
            row.append(Route(*source, *target))
        return row

    backward = chain(stages * microbatches, -1)
    nothing = [Route(None, None, None, None)] * stages
    return {Kind.F: chain(0, 1), Kind.B: backward, Kind.BW: backward, Kind.W: nothing, Kind.PAIR: nothing}


def name(schedule: Schedule, message: int | None) -> str:
    if message is None:
        return "nothing"
    column, microbatch = divmod(message, schedule.microbatches)
    payload, stage = divmod(column, schedule.stages)
    return f"{'FB'[payload]} of stage {stage}, microbatch {microbatch}"
