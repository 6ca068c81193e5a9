"""What a simulated step was like: when everything ran, and the figures by which schedules are compared."""

from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter

from tpmp_kernels.pipeline.costs import Costs
from tpmp_kernels.pipeline.schedule import Event, Kind, Schedule


@dataclass(frozen=True)
class Simulation:
    """One step from time 0 on, in the units of `costs`. Everything that is per rank is indexed by rank.

    starts, ends: of each entry of `schedule.actions[rank]`; the PAIR of a joint step has those of the whole step.
    blocked: the intervals in which the rank waited for a message that was under way, in order: exposed transfer. The
    rest of the time that a rank does not compute, it waits for the computes of others.
    makespan: the last end of all ranks. busy: computing. exposed: the sum of `blocked`. peak_memory: of activations.
    """

    schedule: Schedule
    costs: Costs
    starts: tuple[list[float], ...]
    ends: tuple[list[float], ...]
    blocked: tuple[list[tuple[float, float]], ...]
    makespan: float
    busy: tuple[float, ...]
    exposed: tuple[float, ...]
    peak_memory: tuple[float, ...]

    @property
    def bubble(self) -> float:
        """Time in which a rank does not compute, mean over the ranks."""
        return self.makespan - sum(self.busy) / len(self.busy)

    @property
    def bubble_ratio(self) -> float:
        """The bubble as a share of the makespan."""
        return self.bubble / self.makespan if self.makespan else 0.0

    @property
    def span(self) -> float:
        """The longest of the ranks' times from first start to last end.

        What a step takes where the optimizer is no barrier between ranks, so that each begins the next step by itself.
        """
        return max(map(self._span, range(self.schedule.ranks)))

    @property
    def span_bubble(self) -> float:
        """The most time that a rank does not compute between its first start and its last end."""
        return max(self._span(rank) - busy for rank, busy in enumerate(self.busy))

    def _span(self, rank: int) -> float:
        return self.ends[rank][-1] - self.starts[rank][0] if self.ends[rank] else 0

    @property
    def messages(self) -> int:
        """Transfers between ranks."""
        borders = sum(sender != receiver for sender, receiver in pairwise(self.schedule.placement))
        return borders * self.schedule.microbatches * (2 if self.schedule.backward else 1)

    def events(self) -> list[list[Event]]:
        """For each rank, by start: its computes, and "comm" for the exposed transfer."""
        return [sorted(self._events(rank), key=attrgetter("start")) for rank in range(self.schedule.ranks)]

    def _events(self, rank: int) -> list[Event]:
        timed = zip(self.schedule.actions[rank], self.starts[rank], self.ends[rank], strict=True)
        computes = [Event(*action, start, end) for action, start, end in timed if action[0] is not Kind.PAIR]
        return computes + [Event("comm", None, None, start, end) for start, end in self.blocked[rank]]

    def memory(self, rank: int) -> list[tuple[float, float]]:
        """The rank's activations as points (time, level): each level holds until the next point, and is 0 before the
        first. Where points share a time, the last one holds after it."""
        changes = memory_changes(self.schedule, self.costs)
        points, level = [], 0
        for (kind, stage, _), *times in zip(
            self.schedule.actions[rank], self.starts[rank], self.ends[rank], strict=True
        ):
            for time, change in zip(times, changes[kind][stage], strict=True):
                if change:
                    level += change
                    points.append((time, level))
        return points


def memory_changes(schedule: Schedule, costs: Costs) -> dict[Kind, list[tuple[float, float]]]:
    """[kind][stage]: what is added to the rank's memory at the start of an action, and at its end."""
    whole = costs.activations(schedule.stages, schedule.ranks)
    after_b = [each * (1 - costs.kept) for each in whole]
    changes = {
        Kind.F: [(each, 0 if schedule.backward else -each) for each in whole],
        Kind.B: [(0, -freed) for freed in after_b],
        Kind.W: [(0, freed - each) for each, freed in zip(whole, after_b, strict=True)],
        Kind.BW: [(0, -each) for each in whole],
    }
    return {**changes, Kind.PAIR: [(0, 0)] * schedule.stages}
