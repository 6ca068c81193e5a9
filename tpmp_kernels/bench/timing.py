"""The clock: contenders take turns, so that a machine that slows down slows all of them.

Counts are fixed and the order of turns is a function of the round alone, because near a collective every rank must
make the same calls.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """The samples of one contender, one for each round: seconds of one call, averaged over that round's calls."""

    samples: tuple[float, ...]

    def quantile(self, q: float) -> float:
        """Seconds below which the share `q` of the samples lies, interpolated between neighbours."""
        ordered = sorted(self.samples)
        position = q * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


def turns(names: Sequence[str], rounds: int) -> Iterator[list[str]]:
    """The order of contenders in each round: rotated by one a round and mirrored every second cycle.

    Each contender is first equally often and follows each neighbour from both sides, and no rank has to be told.
    """
    for r in range(rounds):
        start = r % len(names)
        order = [*names[start:], *names[:start]]
        yield order[::-1] if r // len(names) % 2 else order


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    iterations: int,
    warmup: int = 1,
    sync: Callable[[], object] = lambda: None,
    before: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Time the contenders in turns: `warmup` untimed rounds, then `rounds`, each of `iterations` calls a contender.

    `sync` waits for the device (torch.cuda.synchronize) and runs on both sides of the clock. `before` runs ahead of
    every contender's turn outside the clock: it lines ranks up (a barrier) or restores what calls write into.
    The number of calls depends on the arguments alone, never on time, so collectives are safe inside.
    Inputs must be random: a GPU multiplies zeros at less power and higher clocks than data.
    """
    if not contenders:
        raise ValueError("interleave: there are no contenders; pass at least one callable by name")
    if rounds < 1 or iterations < 1 or warmup < 0:
        raise ValueError(
            f"interleave: rounds={rounds}, iterations={iterations}, warmup={warmup}; "
            "pass at least one round of one iteration and no negative warmup"
        )
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for order in turns(list(contenders), warmup + rounds):
        for name in order:
            before()
            samples[name].append(_clock(contenders[name], iterations, sync))
    return {name: Timing(tuple(each[warmup:])) for name, each in samples.items()}


def _clock(call: Callable[[], object], iterations: int, sync: Callable[[], object]) -> float:
    sync()
    start = time.perf_counter()
    for _ in range(iterations):
        call()
    sync()
    return (time.perf_counter() - start) / iterations


def slowest(ranks: Sequence[Mapping[str, Timing]]) -> dict[str, Timing]:
    """Merge what every rank measured: each sample becomes that of the slowest rank, for the group waits for it."""
    return {
        name: Timing(tuple(max(group) for group in zip(*(rank[name].samples for rank in ranks), strict=True)))
        for name in ranks[0]
    }


def rotating(call: Callable, inputs: Sequence[tuple]) -> Callable[[], object]:
    """A callable that steps through `inputs` at each call, so that operands come from memory and not from a cache."""
    position = -1

    def step():
        nonlocal position
        position = (position + 1) % len(inputs)
        return call(*inputs[position])

    return step
