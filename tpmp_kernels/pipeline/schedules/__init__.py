"""The schedules by name. One file each, with two functions:

build(stages, microbatches) -> Schedule
peak_live(rank, stages, microbatches) -> int      the most (stage, microbatch) activations that the rank ever holds
"""

import difflib

from tpmp_kernels.pipeline.schedule import Schedule
from tpmp_kernels.pipeline.schedules import forward_only, gpipe, one_f_one_b

SCHEDULES = {"gpipe": gpipe, "1f1b": one_f_one_b, "forward-only": forward_only}


def build(name: str, *, stages: int, microbatches: int) -> Schedule:
    """The schedule of that name. Fewer microbatches than stages are allowed, with a larger bubble.

    Raises ValueError for an unknown name and for fewer than one stage or microbatch.
    """
    if name not in SCHEDULES:
        nearest = difflib.get_close_matches(name, SCHEDULES, n=1, cutoff=0.0)[0]
        raise ValueError(f"schedule {name!r} is unknown; did you mean {nearest!r}? Known: {', '.join(SCHEDULES)}")
    for what, count in (("stages", stages), ("microbatches", microbatches)):
        if count < 1:
            raise ValueError(f"schedule {name}: {what} is {count}; expected at least 1")
    return SCHEDULES[name].build(stages, microbatches)
