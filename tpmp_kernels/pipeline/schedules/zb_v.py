"""ZB-V (Qi et al., 2024): zero bubble within the memory of 1F1B, from a V and from W that fill the gaps.

Two ranks, stages 0 and 3 on rank 0 and 1 and 2 on rank 1 (a V), four microbatches, all times equal:

    rank 0   0F0 0F1 0F2 3F0 3B0 3W0 3F1 3B1 0B0 3W1 0F3 0W0 3F2 3B2 0B1 3W2 0W1 3F3 3B3 0B2 3W3 0B3 0W2 0W3
    rank 1       1F0 2F0 1F1 2F1 2B0 1B0 2W0 1F2 1W0 2F2 2B1 1B1 2W1 1F3 1W1 2F3 2B2 1B2 2B3 1B3 2W2 1W2 2W3 1W3

First and last stage are on rank 0, so loss and embedding meet, and the turn on the last rank needs no transfer. Between
its own first F and last W no rank idles where F = B = W and there are 2p microbatches. F and B have the order above
whatever the costs, and these decide which of a few rules for W leaves the smallest bubble: often the smallest possible.

As no rank ever waits where all times are equal, no two ranks wait for each other whatever the times; fewer than 2p
microbatches leave out of that order what does not exist, which adds no wait.
"""

from itertools import accumulate, chain, count, repeat

from tpmp_kernels.pipeline.costs import Costs
from tpmp_kernels.pipeline.schedule import Schedule
from tpmp_kernels.pipeline.schedules.greedy import Placed, Rule, Way, place
from tpmp_kernels.pipeline.schedules.placement import folded
from tpmp_kernels.pipeline.schedules.v_pattern import PERIOD, forwards_and_backwards

# Each leaves the smallest bubble for some costs; further ones hardly ever helped, over 575 shapes and costs.
_RULES = (
    Rule(),
    Rule(0.5, 1.0, allowance=1.0, tilt=0.5),
    Rule(0.5, 1.0, allowance=0.5, tilt=1.0),
    Rule(0.0, 1.0),
    Rule(0.5, 1.0, allowance=1.0),
    Rule(0.5, 1.0, allowance=1.0, tilt=1.0),
    Rule(1.0, 1.0),
)


def build(ranks: int, microbatches: int, costs: Costs, *, limit: int | None = None) -> Schedule:
    """limit: of live chunk activations on a rank, 2 to 2 ranks; 2 ranks if None. ValueError for any other."""
    highest = 2 * ranks
    limit = highest if limit is None else limit
    if not 2 <= limit <= highest:
        raise ValueError(
            f"schedule zb-v: limit is {limit}; expected 2 to {highest} live chunk activations on {ranks} ranks"
        )
    way = Way(ranks, microbatches, costs)
    placed = _best(way, _orders(ranks, microbatches, limit), limit)
    return Schedule("zb-v", folded(ranks), microbatches, way.actions(placed.orders))


def _best(way: Way, orders: list[list[int]], limit: int) -> Placed:
    """The smallest bubble of all rules, and of equals the first to end, so that every machine finds the same order."""
    least, best = _least(way, limit), None
    for rule in _RULES:
        placed = place(way, orders, limit, rule, goal=least)
        if best is None or (placed.bubble, placed.end) < (best.bubble, best.end):
            best = placed
        if best.bubble <= least:
            break
    return best


def _orders(ranks: int, microbatches: int, limit: int) -> list[list[int]]:
    """The F and B of each rank, as greedy.py numbers them. For a lower limit they are the first pattern that keeps it:
    that of V-Half, that of V-Min, or that in longer and longer periods."""
    if limit == 2 * ranks:
        return [_order(rank, ranks, microbatches) for rank in range(ranks)]
    for slopes, period in chain([((2, 1, 2, 1), PERIOD)], zip(repeat((1, 1, 1, 1)), count(PERIOD, 2), strict=False)):
        few = min(microbatches, limit + 2)  # enough to exceed the limit, if all of them do
        orders = forwards_and_backwards(ranks, few, slopes, period)
        changes = ((1 if at < 2 * ranks * few else -1 for at in order) for order in orders)
        if max(max(accumulate(each)) for each in changes) <= limit:
            return forwards_and_backwards(ranks, microbatches, slopes, period)
    raise AssertionError("a period that is long enough keeps one microbatch at a time")


def _order(rank: int, ranks: int, microbatches: int) -> list[int]:
    """A leg gives its passes one by one and then nothing."""
    legs = (rank, 2 * ranks - 1 - rank, 2 * ranks + rank, 4 * ranks - 1 - rank)
    passes = (range(leg * microbatches, (leg + 1) * microbatches) for leg in legs)
    f0, f1, b1, b0 = (chain(line, repeat(None)) for line in passes)
    beyond = ranks - 1 - rank  # ranks between this one and the turn of the V
    warm_up = [*[f0] * (2 * beyond + 1), *[f1, f0] * rank, f1, *[b1, f1] * beyond]
    steps = map(next, warm_up + [b1, b0, f0, f1] * microbatches)
    return [each for each in steps if each is not None]


def _least(way: Way, limit: int) -> float:
    """A bubble that no order is below.

    Before its first B can come, a rank has at most `limit` F to compute, and after its last B at most `limit` W. So the
    last rank, which starts late, has to be late with its last B too, and rank 0 waits for what follows from that.
    """
    p, took, held = way.ranks, way.took, min(limit, 2 * way.microbatches)
    ready = [0, *accumulate(time + after for time, after in zip(took, [*way.after, 0], strict=False))]  # by leg
    filled = [ready[2 * p + r] - ready[r] - held * max(took[r], took[2 * p - 1 - r]) for r in range(p)]
    work = [sum(took[leg] for leg in range(6 * p) if leg % (2 * p) in (r, 2 * p - 1 - r)) for r in (0, p - 1)]
    longer = way.microbatches * (work[1] - work[0])  # the last rank's work, against that of rank 0
    last_b = ready[p - 1] + max(filled[-1], 0) + longer - held * max(took[5 * p - 1 : 5 * p + 1])
    return max(0, *filled, last_b + ready[4 * p] - ready[3 * p] - took[3 * p] + took[-1])


def peak_live(rank: int, ranks: int, microbatches: int) -> int:
    return min(2 * microbatches, 2 * ranks)
