"""Where the W of a V schedule go: F and B keep a given order, and W go greedily into the gaps that their times leave.

On p ranks a microbatch takes 4p legs: 0 to 2p-1 are the F of stages 0 to 2p-1, 2p to 4p-1 the B of stages 2p-1 to 0.
Rank r has legs r, 2p-1-r, 2p+r and 4p-1-r. Leg l of microbatch i is the pass l * microbatches + i, so that what it
computes is the input of the pass with `microbatches` more; the W of a B has 2p * microbatches more.
"""

from collections.abc import Iterator
from itertools import chain, pairwise
from math import inf
from typing import NamedTuple

from tpmp_kernels.pipeline.costs import Costs
from tpmp_kernels.pipeline.schedule import Action, Kind
from tpmp_kernels.pipeline.schedules.orders import each


class Rule(NamedTuple):
    """When a W goes into a gap that is too short for it, and so delays the F or B that the gap waits for.

    before_f, before_b: where the gap has at least this share of the W; 1 never delays. allowance, tilt: where the rank
    would have idled for more than goal * (allowance + tilt * rank / ranks) in all, with the goal that `place` gets.
    """

    before_f: float = 0.0
    before_b: float = 0.5
    allowance: float = inf
    tilt: float = 0.0


class Placed(NamedTuple):
    """orders: passes and W, by rank. bubble: the most that a rank idles between its first start and its last end."""

    orders: list[list[int]]
    bubble: float
    end: float


class Way:
    """What all orders with one shape and costs share. By leg: took, its time; after, that to the rank of the next."""

    def __init__(self, ranks: int, microbatches: int, costs: Costs):
        down, up = range(2 * ranks), range(2 * ranks)[::-1]
        self.ranks, self.microbatches = ranks, microbatches
        self.kinds = [(kind, stage) for kind, way in ((Kind.F, down), (Kind.B, up), (Kind.W, up)) for stage in way]
        times = costs.times(2 * ranks, ranks)
        self.took = [times[kind][stage] for kind, stage in self.kinds]
        self.rank = [min(stage, 2 * ranks - 1 - stage) for stage in chain(down, up)]
        self.after = [costs.transfer if here != there else 0 for here, there in pairwise(self.rank)]

    def actions(self, orders: list[list[int]]) -> tuple[tuple[Action, ...], ...]:
        every = list(chain.from_iterable(each(*which, range(self.microbatches)) for which in self.kinds))
        return tuple(tuple(map(every.__getitem__, order)) for order in orders)


def place(way: Way, orders: list[list[int]], limit: int, rule: Rule, goal: float = 0.0) -> Placed:
    """Each rank computes the passes of its order as their inputs come, and W where memory does not allow an F, where a
    gap has room, and where the rule says so.

    limit: of live chunk activations on a rank; no order needs more. None waits for a W, so W delay but never block.
    """
    m, ranks = way.microbatches, range(way.ranks)
    arrival = [0] * m + [None] * (4 * way.ranks * m)  # by pass, when its input is there; the last leg has none after it
    stopped = [-1] * way.ranks  # the pass whose input a rank waits for the time of
    placed, idle, ends = [[] for _ in ranks], [0] * way.ranks, [0] * way.ranks

    def carry_out(rank: int) -> Iterator[None]:
        """Stops where the next input has no time yet, so that the length of a gap is known when W are put into it."""
        took, after, rank_of, done, turn = way.took, way.after, way.rank, placed[rank], 2 * way.ranks * m
        allowed = goal * (rule.allowance + rule.tilt * rank / way.ranks) if rule.allowance < inf else inf
        shares = rule.before_f, rule.before_b if rank else 0.0  # nothing waits for the B of stage 0
        clock, idled, live, waiting, oldest = None, 0, 0, [], 0
        for at in orders[rank]:
            if arrival[at] is None:
                stopped[rank] = at
                yield
            arrives = arrival[at]
            if clock is None:
                clock = arrives
            backward = at >= turn
            while oldest < len(waiting) and (arrives > clock or (live >= limit and not backward)):
                weight = waiting[oldest]
                time, gap = took[weight // m], arrives - clock
                if gap < time * shares[backward] and idled + gap <= allowed and (backward or live < limit):
                    break
                done.append(weight)
                oldest, live, clock = oldest + 1, live - 1, clock + time
            if arrives > clock:
                idled, clock = idled + arrives - clock, arrives
            leg = at // m
            clock += took[leg]
            done.append(at)
            if backward:
                waiting.append(at + turn)
            else:
                live += 1
            if leg < len(after):
                arrival[at + m] = clock + after[leg]
                if stopped[rank_of[leg + 1]] == at + m:
                    ready.append(rank_of[leg + 1])
        done += waiting[oldest:]
        idle[rank], ends[rank] = idled, clock + sum(took[weight // m] for weight in waiting[oldest:])

    runs, ready = [carry_out(rank) for rank in ranks], [*ranks]
    while ready:
        next(runs[ready.pop()], None)
    return Placed(placed, max(idle), max(ends))
