"""Where the W of a V schedule go: F and B in a given order, and W greedily into the gaps that their times leave.

Ranks are advanced by their clocks. A rank computes the next F or B of its order as soon as its input is there and
memory allows. It computes a W where memory does not allow the next F, where nothing else is left, and in a gap that W
fits into or that is longer than is tolerated. In a gap it may also start F of chunk 0 ahead of their turn.
"""

import heapq
import math
from collections import deque
from typing import NamedTuple

from tpmp_kernels.pipeline.costs import Costs
from tpmp_kernels.pipeline.schedule import Action, Kind
from tpmp_kernels.pipeline.schedules.v_pattern import UNITS, Pass


class Rules(NamedTuple):
    """limit: of live chunk activations on a rank. ahead: whether F of chunk 0 may start ahead of their turn.
    fill_f, fill_b: whether a W may delay the F, or the B, that a gap is waiting for, where that gap is longer than
    `tolerated`."""

    limit: int
    ahead: bool = False
    fill_f: bool = True
    fill_b: bool = True
    tolerated: float = 0.0


class Placed(NamedTuple):
    """orders: by rank. bubble: the most that a rank idles between its first start and its last end."""

    orders: list[list[Action]]
    bubble: float


def place(orders: list[list[Pass]], microbatches: int, costs: Costs, rules: Rules) -> Placed | None:
    """None where the order needs more activations at once than the limit."""
    run = _Run(orders, microbatches, costs, rules)
    while run.heap:
        time, rank = heapq.heappop(run.heap)
        if time >= run.clock[rank]:  # else it was pushed for an input that came while the rank computed
            run.advance(rank, time)
    ranks = range(len(orders))
    if any(len(run.actions[rank]) < UNITS * microbatches for rank in ranks):
        return None
    bubble = max(run.clock[rank] - run.start[rank] - run.busy[rank] for rank in ranks)
    return Placed(run.actions, bubble)


class _Run:
    def __init__(self, orders: list[list[Pass]], microbatches: int, costs: Costs, rules: Rules):
        self.ranks, self.stages = len(orders), 2 * len(orders)
        self.orders, self.microbatches, self.rules, self.transfer = orders, microbatches, rules, costs.transfer
        times = costs.times(self.stages, self.ranks)
        self.times = times[Kind.F], times[Kind.B], times[Kind.W]
        # [whether it is a B][stage][microbatch]: when its input is there, as far as that is known.
        self.arrival = [[[math.inf] * microbatches for _ in range(self.stages)] for _ in range(2)]
        self.arrival[0][0] = [0.0] * microbatches
        self.clock, self.busy, self.position, self.live, self.forwards = ([0] * self.ranks for _ in range(5))
        self.start: list[float | None] = [None] * self.ranks
        self.weights = [deque() for _ in range(self.ranks)]  # (stage, microbatch) of W that are not computed yet
        self.actions: list[list[Action]] = [[] for _ in range(self.ranks)]
        self.sleeping = [False] * self.ranks
        self.heap = [(0.0, rank) for rank in range(self.ranks)]

    def advance(self, rank: int, now: float) -> None:
        """Compute one thing, or sleep until the next input."""
        self.sleeping[rank] = False
        order, weights, rules = self.orders[rank], self.weights[rank], self.rules
        at = self.position[rank]
        while at < len(order) and order[at][:2] == (False, 0) and order[at][2] < self.forwards[rank]:
            at += 1  # started ahead of its turn
        self.position[rank] = at
        if at == len(order):
            if weights:
                self._compute_weight(rank, now)
            return
        backward, chunk, microbatch = order[at]
        arrives = self.arrival[backward][self._stage(rank, chunk)][microbatch]
        full = not backward and self.live[rank] >= rules.limit
        if arrives > now and rules.ahead and self._starts_ahead(rank, now, arrives):
            self._compute(rank, now, False, 0, self.forwards[rank])
        elif weights and (full or (arrives > now and self._fills(weights[0][0], arrives - now, backward))):
            self._compute_weight(rank, now)
        elif arrives > now:
            self.sleeping[rank] = True
            if arrives < math.inf:
                heapq.heappush(self.heap, (arrives, rank))
        elif not full:
            self.position[rank] = at + 1
            self._compute(rank, now, backward, chunk, microbatch)

    def _starts_ahead(self, rank: int, now: float, arrives: float) -> bool:
        """One slot of the limit stays free for chunk 1, so that the oldest microbatch can always go on."""
        following = self.forwards[rank]
        return (
            following < self.microbatches
            and self.live[rank] + 1 < self.rules.limit
            and self.arrival[0][rank][following] <= now
            and arrives >= now + self.times[0][rank]
        )

    def _fills(self, stage: int, gap: float, backward: bool) -> bool:
        fill = self.rules.fill_b if backward else self.rules.fill_f
        return gap >= self.times[2][stage] or (fill and gap > self.rules.tolerated)

    def _stage(self, rank: int, chunk: int) -> int:
        return self.stages - 1 - rank if chunk else rank

    def _compute_weight(self, rank: int, now: float) -> None:
        stage, microbatch = self.weights[rank].popleft()
        self.live[rank] -= 1
        self._record(rank, now, Action(Kind.W, stage, microbatch), self.times[2][stage])

    def _compute(self, rank: int, now: float, backward: bool, chunk: int, microbatch: int) -> None:
        stage = self._stage(rank, chunk)
        self._record(rank, now, Action(Kind.B if backward else Kind.F, stage, microbatch), self.times[backward][stage])
        if backward:
            self.weights[rank].append((stage, microbatch))
            if stage > 0:
                self._arrive(rank, True, stage - 1, microbatch)
            return
        self.live[rank] += 1
        self.forwards[rank] += chunk == 0
        last = stage == self.stages - 1  # its loss is where its backward starts
        self._arrive(rank, last, stage if last else stage + 1, microbatch)

    def _arrive(self, rank: int, backward: bool, stage: int, microbatch: int) -> None:
        receiver = min(stage, self.stages - 1 - stage)
        time = self.clock[rank] + (self.transfer if receiver != rank else 0)
        self.arrival[backward][stage][microbatch] = time
        if self.sleeping[receiver]:
            heapq.heappush(self.heap, (time, receiver))

    def _record(self, rank: int, now: float, action: Action, took: float) -> None:
        if self.start[rank] is None:
            self.start[rank] = now
        self.actions[rank].append(action)
        self.clock[rank] = now + took
        self.busy[rank] += took
        heapq.heappush(self.heap, (now + took, rank))
