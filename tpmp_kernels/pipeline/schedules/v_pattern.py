"""The repeating pattern of V schedules (Qi et al., 2024, "Pipeline Parallelism with Controllable Memory").

In units of one F, B or W of a chunk, every rank starts a microbatch once a period, 6 units, and computes its F and B of
both chunks at fixed times in between: with slopes (a, b, c, e), rank r at

    F of chunk 0   a r               down the V            F of chunk 1   C1 - b r    up again, to the loss on rank 0
    B of chunk 1   C2 + c r          down                  B of chunk 0   C3 - e r    up

The slopes decide memory: a chunk's activation lives from its F to its W, so a rank holds about (a + b + c + e) ranks /
period of them, the same on every rank where a + e = b + c. W takes units that are left.
"""

from itertools import product

PERIOD = 6
Slopes = tuple[int, int, int, int]


def forwards_and_backwards(ranks: int, microbatches: int, slopes: Slopes, period: int = PERIOD) -> list[list[int]]:
    """For each rank its passes, as greedy.py numbers them, in the order of their times.

    Inputs come at earlier times, so no two ranks can wait for each other, also where W or fewer microbatches shift all.
    """
    turns = _turns(ranks, slopes, period)
    legs, passes = (0, 2 * ranks - 1, 2 * ranks, 4 * ranks - 1), 4 * ranks * microbatches
    orders = []
    for rank in range(ranks):
        ways = zip(legs, (1, -1, 1, -1), _times(rank, slopes, turns), strict=True)
        starts = [(time, (leg + way * rank) * microbatches) for leg, way, time in ways]
        keys = [(time + period * i) * passes + first + i for time, first in starts for i in range(microbatches)]
        orders.append([key % passes for key in sorted(keys)])
    return orders


def _times(rank: int, slopes: Slopes, turns: tuple[int, int, int]) -> tuple[int, int, int, int]:
    (a, b, c, e), (first, second, third) = slopes, turns
    return a * rank, first - b * rank, second + c * rank, third - e * rank


def _turns(ranks: int, slopes: Slopes, period: int) -> tuple[int, int, int]:
    """(C1, C2, C3): as early as the inputs allow, but with different units, modulo the period, for a rank's passes."""
    a, b, c, e = slopes
    for later in range(3 * period):
        for x, y in product(range(later + 1), repeat=2):
            if x + y > later:
                continue
            first = (a + b) * (ranks - 1) + 1 + x
            second = first + 1 + y
            third = second + (c + e) * (ranks - 1) + 1 + later - x - y
            times = (_times(rank, slopes, (first, second, third)) for rank in range(min(ranks, period)))
            if all(len({time % period for time in passes}) == len(passes) for passes in times):
                return first, second, third
    raise AssertionError(f"slopes {slopes} meet on some rank whatever the turns, in a period of {period}")
