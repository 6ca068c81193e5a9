"""Interleaved 1F1B (Narayanan et al., 2021): several smaller stages on each rank, so the pipe fills in smaller steps.

Two ranks, two chunks (stages 0 and 2 on rank 0, 1 and 3 on rank 1), four microbatches; 2F1 is F1 of stage 2:

    rank 0   0F0 0F1 2F0 2F1 0F2  2BW0 0F3  2BW1 2F2  0BW0 2F3  0BW1     2BW2     2BW3 0BW2 0BW3
    rank 1       1F0 1F1 3F0 3BW0 3F1  3BW1 1F2  1BW0 1F3  1BW1 3F2 3BW2 3F3 3BW3 1BW2 1BW3

Microbatches go in groups of p: forwards of the group through all stages of the rank, first to last, then of the next
group; backwards the same from the last stage to the first. After the warm-up they alternate. With v chunks the bubble
is that of 1F1B divided by v, where p divides m; transfers are v times as many.

Any number of microbatches m: the order is that for the next multiple of p, and what does not exist in it is left out.
That cannot deadlock: an action waits for actions of its own microbatch and for those before it on its rank, so to leave
out a whole microbatch, on all ranks, takes waits away and adds none.
"""

from tpmp_kernels.pipeline.schedule import Action, Kind, Schedule
from tpmp_kernels.pipeline.schedules.orders import each, weave
from tpmp_kernels.pipeline.schedules.placement import looped


def build(ranks: int, microbatches: int, chunks: int) -> Schedule:
    orders = (_order(rank, ranks, microbatches, chunks) for rank in range(ranks))
    return Schedule("interleaved-1f1b", looped(ranks, chunks), microbatches, tuple(orders))


def _order(rank: int, ranks: int, microbatches: int, chunks: int) -> tuple[Action, ...]:
    stages = range(rank, ranks * chunks, ranks)
    forwards = _in_groups(Kind.F, stages, ranks, microbatches)
    backwards = _in_groups(Kind.BW, stages[::-1], ranks, microbatches)
    warm_up = _warm_up(rank, ranks, chunks)
    return (*weave(forwards[:warm_up]), *weave(forwards[warm_up:], backwards))


def _in_groups(kind: Kind, stages: range, ranks: int, microbatches: int) -> list[Action | None]:
    """All stages over one group of microbatches after the other; None for what the last group lacks."""
    lacking = [None] * (-microbatches % ranks)
    rows = [each(kind, stage, range(microbatches)) + lacking for stage in stages]
    return [action for group in range(0, microbatches, ranks) for row in rows for action in row[group : group + ranks]]


def _warm_up(rank: int, ranks: int, chunks: int) -> int:
    return 2 * (ranks - 1 - rank) + (chunks - 1) * ranks


def peak_live(rank: int, ranks: int, microbatches: int, chunks: int) -> int:
    """Exact where p divides m. Otherwise a bound: forwards and backwards run through the microbatches alike, so up to
    any point at least as many forwards are missing as backwards."""
    return min(chunks * microbatches, _warm_up(rank, ranks, chunks) + 1)
