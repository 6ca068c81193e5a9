"""What the written-down orders are put together from: the actions of one kind on one stage, and weaving such lists.

F0 F1 F2 F3            after a warm-up of 1, forwards[:1] + weave(forwards[1:], backwards), they are
BW0 BW1 BW2 BW3        F0 F1 BW0 F2 BW1 F3 BW2 BW3
"""

from collections.abc import Iterable
from itertools import chain, repeat, zip_longest

from tpmp_kernels.pipeline.schedule import Action, Kind


def each(kind: Kind, stage: int, microbatches: Iterable[int]) -> list[Action]:
    """One action for each microbatch. `tuple.__new__` takes half the time of `Action(...)`, so a build does too."""
    return list(map(tuple.__new__, repeat(Action), zip(repeat(kind), repeat(stage), microbatches)))


def weave(*lists: list) -> list:
    """The first of each list, then the second of each, and so on; where there is None, or nothing any more, nothing."""
    return list(filter(None, chain.from_iterable(zip_longest(*lists))))
