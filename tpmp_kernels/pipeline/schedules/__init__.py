"""The schedules by name. One file each, with two functions:

build(ranks, microbatches) -> Schedule
peak_live(rank, ranks, microbatches) -> int       the most (stage, microbatch) activations that the rank ever holds

where both take the chunks (stages on one rank) too if these can be chosen, and `build` takes costs if it uses them.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from tpmp_kernels.pipeline.costs import Costs
from tpmp_kernels.pipeline.schedule import Schedule
from tpmp_kernels.pipeline.schedules import (
    dualpipe_v,
    eager_one_f_one_b,
    forward_only,
    gpipe,
    interleaved_one_f_one_b,
    one_f_one_b,
    v_half,
    v_min,
    zb_h1,
    zb_h2,
    zb_v,
)
from tpmp_kernels.pipeline.schedules.placement import folded, looped


@dataclass(frozen=True)
class Entry:
    """chunks: stages on each rank, None where the caller chooses. fed: whether the order depends on costs."""

    build: Callable[..., Schedule]
    peak_live: Callable[..., int]
    chunks: int | None = 1
    placement: Callable[[int, int], tuple[int, ...]] = looped
    fed: bool = False


SCHEDULES = {
    "gpipe": Entry(gpipe.build, gpipe.peak_live),
    "1f1b": Entry(one_f_one_b.build, one_f_one_b.peak_live),
    "1f1b-eager": Entry(eager_one_f_one_b.build, eager_one_f_one_b.peak_live),
    "interleaved-1f1b": Entry(interleaved_one_f_one_b.build, interleaved_one_f_one_b.peak_live, chunks=None),
    "zb-h1": Entry(zb_h1.build, zb_h1.peak_live),
    "zb-h2": Entry(zb_h2.build, zb_h2.peak_live),
    "zb-v": Entry(zb_v.build, zb_v.peak_live, chunks=2, placement=folded, fed=True),
    "v-half": Entry(v_half.build, v_half.peak_live, chunks=2, placement=folded),
    "v-min": Entry(v_min.build, v_min.peak_live, chunks=2, placement=folded),
    "dualpipe-v": Entry(dualpipe_v.build, dualpipe_v.peak_live, chunks=2, placement=folded),
    "forward-only": Entry(forward_only.build, forward_only.peak_live),
}


def build(
    name: str, *, ranks: int, microbatches: int, chunks: int | None = None, costs: Costs | None = None
) -> Schedule:
    """The schedule of that name. Fewer microbatches than ranks are allowed, with a larger bubble.

    chunks: stages on each rank, where the schedule leaves the choice (2 if None). costs: all times 1 if None; only
    schedules that are searched for look at them.
    Raises ValueError for an unknown name, fewer than one rank or microbatch, and chunks that the schedule cannot have.
    """
    if name not in SCHEDULES:
        nearest = difflib.get_close_matches(name, SCHEDULES, n=1, cutoff=0.0)[0]
        raise ValueError(f"schedule {name!r} is unknown; did you mean {nearest!r}? Known: {', '.join(SCHEDULES)}")
    for what, count in (("ranks", ranks), ("microbatches", microbatches)):
        if count < 1:
            raise ValueError(f"schedule {name}: {what} is {count}; expected at least 1")
    entry = SCHEDULES[name]
    sizes = [ranks, microbatches]
    if entry.chunks is None:
        sizes.append(_checked_chunks(name, 2 if chunks is None else chunks))
    elif chunks not in (None, entry.chunks):
        raise ValueError(f"schedule {name}: chunks is {chunks}; it has {entry.chunks} on each rank, leave chunks out")
    return entry.build(*sizes, costs or Costs()) if entry.fed else entry.build(*sizes)


def peak_live(name: str, rank: int, *, ranks: int, microbatches: int, chunks: int) -> int:
    """The closed form of the most (stage, microbatch) activations that `rank` of the named schedule ever holds."""
    entry = SCHEDULES[name]
    sizes = (ranks, microbatches) if entry.chunks is not None else (ranks, microbatches, chunks)
    return entry.peak_live(rank, *sizes)


def _checked_chunks(name: str, chunks: int) -> int:
    if chunks < 1:
        raise ValueError(f"schedule {name}: chunks is {chunks}; expected at least 1")
    return chunks
