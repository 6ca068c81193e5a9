"""DualPipeV (DeepSeek-AI, 2025): forwards of one microbatch run jointly with backwards of another, to hide transfers.

Two ranks, stages 0 and 3 on rank 0 and 1 and 2 on rank 1 (a V), four microbatches; & joins a joint step:

    rank 0   0F0 0F1 0F2 3F0 3B0 3W0 3F1  0F3&3BW1 3F2&0BW0 3BW2     3F3&0BW1 3BW3 0B2 0W2 0B3 0W3
    rank 1       1F0 2F0 1F1 2F1 1F2 2BW0 2F2&1BW0 1F3&2BW1 2F3&1BW1 2BW2 1BW2     2B3 1B3 2W3 1W3

All ranks keep at most 2p + 1 of their 2m stage activations in memory. Where the times of a stage are equal, the bubble
is (p-1) (FB + BW - 3W) with FB for a joint step, which waits for the inputs of both halves. So it pays where FB is well
below F + BW: where there is something to hide. Where there is not, the order apart (without joint steps) has half of
that bubble, (p-1) (F + B - W), as each F then starts on its own input and its output leaves at once.

It needs 2p microbatches; with fewer, the order is that for 2p and what does not exist in it is left out. As in
interleaved-1f1b, that adds no wait, so it cannot deadlock. A joint step that lacks a half is none any more: its F, of
the newer microbatch, is missing then, and its PAIR, which has the number of that F, is left out with it.
"""

from collections.abc import Iterator
from itertools import chain, repeat

from tpmp_kernels.pipeline.schedule import Action, Kind, Schedule
from tpmp_kernels.pipeline.schedules.orders import each, weave
from tpmp_kernels.pipeline.schedules.placement import folded


def build(ranks: int, microbatches: int) -> Schedule:
    orders = (_order(rank, ranks, microbatches) for rank in range(ranks))
    return Schedule("dualpipe-v", folded(ranks), microbatches, tuple(orders))


def _order(rank: int, ranks: int, microbatches: int) -> tuple[Action, ...]:
    """f0, b0, w0 are lines of chunk 0 and f1, b1, w1 of chunk 1: a step names the lines that it takes the next from."""
    total = max(microbatches, 2 * ranks)
    here, beyond = rank + 1, ranks - 1 - rank  # ranks up to this one, and between it and the turn of the V
    late0, late1 = total - ranks + here // 2, total - here // 2  # the backwards that are split, to leave W for the end
    first, second = rank, 2 * ranks - 1 - rank  # stages

    def line(stage: int, *runs: tuple[Kind, int, int]) -> Iterator[Action | None]:
        existing = (each(kind, stage, range(start, min(stop, microbatches))) for kind, start, stop in runs)
        return chain(*existing, repeat(None))

    f0, f1 = line(first, (Kind.F, 0, total)), line(second, (Kind.F, 0, total))
    joint0 = line(first, (Kind.PAIR, ranks + max(beyond, 1), total))
    joint1 = line(second, (Kind.PAIR, ranks, total))
    b0 = line(first, (Kind.BW, 0, late0), (Kind.B, late0, total))
    b1 = line(second, (Kind.B, 0, beyond), (Kind.BW, beyond, late1), (Kind.B, late1, total))
    w0 = line(first, (Kind.W, late0, total))
    w1 = line(second, (Kind.W, 0, beyond), (Kind.W, late1, total))

    full = [joint0, f0, b1, joint1, f1, b0] * (total - 2 * ranks + here)
    late = ([w1, w0] * here)[-here:] + [w0] * beyond
    steps = [
        *[f0] * (2 * beyond),
        *[f0, f1] * here,
        *[b1, w1, f1] * beyond,
        *(full if beyond else full[1:]),  # as published: at the turn the first two are not joint
        *[b1, joint1, f1, b0] * beyond,
        *[b1, b0] * here,
        *weave(late[:beyond], [b0] * beyond),
        *late[beyond:],
    ]
    return tuple(filter(None, map(next, steps)))


def peak_live(rank: int, ranks: int, microbatches: int) -> int:
    return min(2 * microbatches, 2 * ranks + 1)
