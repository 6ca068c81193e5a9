"""How the best split is found: dynamic programming where each stage is alone on its rank, else a search with bounds.

A split is its borders: stage g has layers borders[g] .. borders[g + 1] - 1. Its value is a tuple, smaller is better:

    (memory above the limit, time of the slowest rank, time of the largest stage, memory of the fullest rank)
"""

import math
import operator
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

from tpmp_kernels.pipeline.partition_pins import Pins

NODES = 50_000  # half a second
_MOST_STAGES = 200  # of a search, whose recursion is as deep

Value = tuple[float, float, float, float]


@dataclass
class Problem:
    """By layer: work, its time; sends, the time of a message behind it (None: no time); activation; parameters.

    in_flight: by rank. limit: of a rank's memory. backward: whether gradients travel too.
    """

    work: Sequence[float]
    sends: Sequence[float] | None
    activation: Sequence[float]
    parameters: Sequence[float]
    placement: tuple[int, ...]
    ranks: int
    in_flight: tuple[int, ...]
    limit: float
    backward: bool
    pins: Pins

    def __post_init__(self):
        self._work, self._activation, self._parameters = map(_sums, (self.work, self.activation, self.parameters))
        self.stages, self.layers = len(self.placement), len(self.work)
        self.alone = len(set(self.placement)) == self.stages  # each stage on its rank

    def compute(self, start: int, stop: int) -> float:
        return self._work[start][stop - start - 1]

    def time(self, stage: int, start: int, stop: int) -> float:
        """Of the stage with layers start..stop-1: computing, and what it sends to other ranks."""
        time, rank = self.compute(start, stop), self.placement[stage]
        if self.sends is not None:
            if stage + 1 < self.stages and self.placement[stage + 1] != rank:
                time += self.sends[stop - 1]
            if stage > 0 and self.backward and self.placement[stage - 1] != rank:
                time += self.sends[start - 1]
        return time

    def held(self, start: int, stop: int) -> tuple[float, float]:
        """(activation, parameters)."""
        return self._activation[start][stop - start - 1], self._parameters[start][stop - start - 1]

    def memory(self, stage: int, start: int, stop: int) -> float:
        """Of a rank with this stage alone."""
        activation, parameters = self.held(start, stop)
        return self.in_flight[self.placement[stage]] * activation + parameters

    def rank_times(self, borders: Sequence[int]) -> list[float]:
        times = [0] * self.ranks
        for stage, rank in enumerate(self.placement):
            times[rank] += self.time(stage, borders[stage], borders[stage + 1])
        return times

    def rank_memory(self, borders: Sequence[int]) -> list[float]:
        activations, parameters = [0] * self.ranks, [0] * self.ranks
        for stage, rank in enumerate(self.placement):
            activation, more = self.held(borders[stage], borders[stage + 1])
            activations[rank], parameters[rank] = max(activations[rank], activation), parameters[rank] + more
        return [count * a + p for count, a, p in zip(self.in_flight, activations, parameters, strict=True)]

    def value(self, borders: Sequence[int]) -> Value:
        memory = max(self.rank_memory(borders))
        largest = max(self.time(stage, borders[stage], borders[stage + 1]) for stage in range(self.stages))
        return max(0, memory - self.limit), max(self.rank_times(borders)), largest, memory


def _sums(each: Sequence[float]) -> list[list[float]]:
    """[start][length - 1]. Added up from each start anew: equal layers have equal sums wherever they stand, which
    differences of sums from the first layer on would not have in floating point, and ties would be lost."""
    sums = []
    for start in range(len(each)):
        total, row = 0, []
        for number in each[start:]:
            total += number
            row.append(total)
        sums.append(row)
    return sums


def find(problem: Problem) -> tuple[list[int], bool] | None:
    """(borders, whether they are proved best), or None where none that was found keeps the limit."""
    if not problem.alone:
        borders, optimal = _search(problem)
        return (borders, optimal) if problem.value(borders)[0] == 0 else None

    def fits(*part: int) -> bool:
        return problem.pins.allow(*part) and (problem.limit == math.inf or problem.memory(*part) <= problem.limit)

    fastest = best_chain(problem, problem.time, fits)
    if fastest is None:
        return None
    slowest = fastest[0]
    fullest, _ = best_chain(problem, problem.memory, lambda *part: problem.time(*part) <= slowest and fits(*part))
    _, borders = best_chain(
        problem,
        lambda *part: problem.time(*part) ** 2,
        lambda *part: problem.time(*part) <= slowest and problem.memory(*part) <= fullest and fits(*part),
        join=operator.add,
    )
    return borders, True


def least_memory(problem: Problem) -> tuple[list[int], bool]:
    """The split whose fullest rank is the emptiest, whatever its times."""
    if not problem.alone:
        return _search(replace(problem, limit=0))
    _, borders = best_chain(problem, problem.memory, problem.pins.allow)
    return borders, True


def best_chain(
    problem: Problem,
    value: Callable[[int, int, int], float],
    allow: Callable[[int, int, int], bool],
    join: Callable[[float, float], float] = max,
) -> tuple[float, list[int]] | None:
    """(the smallest value of all stages joined, borders with it), of stages (number, start, stop) that are allowed;
    None where there are no such. join grows with both of its values, which are at least 0.

    best[stop] is the answer for the first stages alone, which have layers 0 .. stop-1. O(stages layers^2).
    """
    stages, layers = problem.stages, problem.layers
    best: dict[int, float] = {0: 0}
    came: list[dict[int, int]] = []  # by stage: its stop -> its start
    for stage in range(stages):
        reached, starts = {}, {}
        for stop in range(stage + 1, layers - (stages - stage) + 2) if stage < stages - 1 else [layers]:
            for start in range(stop - 1, stage - 1, -1):
                if start in best and best[start] < reached.get(stop, math.inf) and allow(stage, start, stop):
                    joined = join(best[start], value(stage, start, stop))
                    if joined < reached.get(stop, math.inf):
                        reached[stop], starts[stop] = joined, start
        best = reached
        came.append(starts)
    if layers not in best:
        return None
    borders = [layers]
    for starts in reversed(came):
        borders.insert(0, starts[borders[0]])
    return best[layers], borders


def _search(problem: Problem) -> tuple[list[int], bool]:
    """For several stages on a rank: (borders, whether all others are known to be no better)."""
    _, borders = best_chain(problem, lambda *part: problem.time(*part) ** 2, problem.pins.allow, join=operator.add)
    borders = _improved(problem, borders)
    if problem.stages > _MOST_STAGES:
        return borders, False
    search = _Search(problem, borders)
    search.extend(0, 0, (0, 0, 0, 0))
    return search.borders, search.nodes <= NODES


def _improved(problem: Problem, borders: list[int]) -> list[int]:
    """While it gains anything, one layer's place is moved from a stage to another, by all borders between the two; each
    time where that gains most. Ranks are compared from the slowest on, or several slowest ones could never improve."""

    def rank(borders: list[int]) -> tuple:
        above, _, largest, memory = problem.value(borders)
        return above, sorted(problem.rank_times(borders), reverse=True), largest, memory

    while True:
        moved = [
            [*borders[:at], *(border + by for border in borders[at:until]), *borders[until:]]
            for at, until in combinations(range(1, problem.stages + 1), 2)
            for by in (-1, 1)
        ]
        best = min((each for each in moved if _allowed(problem, each)), key=rank, default=borders)
        if rank(best) >= rank(borders):
            return borders
        borders = best


def _allowed(problem: Problem, borders: list[int]) -> bool:
    parts = enumerate(pairwise(borders))
    return all(start < stop and problem.pins.allow(stage, start, stop) for stage, (start, stop) in parts)


class _Search:
    """Depth first over the stages. A beginning of a split is left out where its bound is no better than the best split
    known: no number of a value becomes smaller as stages are added.

    The rest is by rank, of the stages so far: loads, their time; activations, the largest; parameters, of all.
    """

    def __init__(self, problem: Problem, borders: list[int]):
        self.problem, self.borders, self.best = problem, borders, problem.value(borders)
        self.near, self.nodes, self.begun = borders, 0, [0]
        self.loads, self.activations, self.parameters = ([0] * problem.ranks for _ in range(3))
        # The ranks that have a stage from number g on.
        self.open = [sorted(set(problem.placement[stage:])) for stage in range(problem.stages)]

    def extend(self, stage: int, start: int, value: Value) -> None:
        """Try every stop of `stage`, which begins with layer `start`; `value` is that of the stages before."""
        problem, rank = self.problem, self.problem.placement[stage]
        load, activation, parameters = self.loads[rank], self.activations[rank], self.parameters[rank]
        last = stage == problem.stages - 1
        for stop in self._stops(stage, start, load):
            if self.nodes > NODES:
                break
            self.nodes += 1
            time, (held, more) = problem.time(stage, start, stop), problem.held(start, stop)
            self.loads[rank], self.parameters[rank] = load + time, parameters + more
            self.activations[rank] = max(activation, held)
            memory = max(value[3], problem.in_flight[rank] * self.activations[rank] + self.parameters[rank])
            now = max(0, memory - problem.limit), max(value[1], self.loads[rank]), max(value[2], time), memory
            if last:
                if now < self.best:
                    self.best, self.borders = now, [*self.begun, stop]
            elif (now[0], max(now[1], self._share(stage + 1, stop)), *now[2:]) < self.best:
                self.begun.append(stop)
                self.extend(stage + 1, stop, now)
                self.begun.pop()
        self.loads[rank], self.activations[rank], self.parameters[rank] = load, activation, parameters

    def _stops(self, stage: int, start: int, load: float) -> list[int]:
        """Those that can be better than the best split known, those first that are nearest to the split begun with."""
        problem = self.problem
        latest = problem.layers - (problem.stages - stage) + 1
        stops = range(start + 1 if stage < problem.stages - 1 else latest, latest + 1)
        most = self.best[1] if self.best[0] == 0 else math.inf
        slow = bisect_right(stops, most, key=lambda stop: load + problem.compute(start, stop))
        allowed = [stop for stop in stops[:slow] if problem.pins.allow(stage, start, stop)]
        return sorted(allowed, key=lambda stop: abs(stop - self.near[stage + 1]))

    def _share(self, stage: int, start: int) -> float:
        """What one of the ranks that still get stages has at least in the end: they share the rest equally. Less a
        hair, for sums in another order differ by their rounding."""
        open_ranks = self.open[stage]
        rest = self.problem.compute(start, self.problem.layers) + sum(self.loads[rank] for rank in open_ranks)
        return rest / len(open_ranks) * (1 - 1e-12)
