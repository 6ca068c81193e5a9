"""What the user fixes of a partition, by names of layers: which stages begin where, and where some stage begins."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise


@dataclass(frozen=True)
class Pins:
    """begins: stage -> the layer that it begins with. before[i]: how many layers up to i begin a stage, whichever."""

    begins: Mapping[int, int] = field(default_factory=dict)
    before: Sequence[int] | None = None

    def allow(self, stage: int, start: int, stop: int) -> bool:
        """Whether the stage may have layers start..stop-1."""
        begins = self.begins
        if begins and (begins.get(stage, start) != start or begins.get(stage + 1, stop) != stop):
            return False
        return self.before is None or self.before[stop - 1] == self.before[start]


def pins(names: Sequence[str], stages: int, overrides: Mapping[str, int] | Sequence[str]) -> Pins:
    """Of `overrides` as in `partition`. At least one split keeps what is returned; else ValueError, in one sentence."""
    overrides = [overrides] if isinstance(overrides, str) else overrides
    for name in overrides:
        if name not in names:
            nearest = difflib.get_close_matches(str(name), names, n=1, cutoff=0.0)[0]
            raise ValueError(f"partition: unknown layer {name!r}; the nearest known one is {nearest!r}")
    if isinstance(overrides, Mapping):
        return Pins(begins=_begins(names, stages, overrides))
    places = sorted({names.index(name) for name in overrides} - {0})
    if len(places) >= stages:
        raise ValueError(
            f"partition: {', '.join(names[place] for place in places)} are each to begin a stage behind the first, of "
            f"which there are {stages - 1}; leave {len(places) - stages + 1} of them out"
        )
    return Pins(before=list(accumulate(place in places for place in range(len(names)))))


def _begins(names: Sequence[str], stages: int, overrides: Mapping[str, int]) -> dict[int, int]:
    fixed: dict[int, str] = {}
    for name, stage in overrides.items():
        if not 0 <= stage < stages:
            raise ValueError(f"partition: {name} is to begin stage {stage}; expected a stage from 0 to {stages - 1}")
        if stage in fixed:
            raise ValueError(f"partition: {fixed[stage]} and {name} are both to begin stage {stage}; leave one out")
        fixed[stage] = name
    if fixed.setdefault(0, names[0]) != names[0]:
        raise ValueError(
            f"partition: {fixed[0]} is to begin stage 0, which begins with {names[0]}; give {fixed[0]} another stage"
        )
    begins = {stage: names.index(name) for stage, name in sorted(fixed.items())}
    ends = [*begins.items(), (stages, len(names))]
    for (stage, place), (later, end) in pairwise(ends):
        if end - place < later - stage:
            until = f"stage {later} begins with {names[end]}" if later < stages else "the last layer ends"
            raise ValueError(
                f"partition: stage {stage} is to begin with {names[place]}, but {until}, which leaves "
                f"{max(end - place, 0)} layers for {later - stage} stages; expected one for each, change one"
            )
    return begins
