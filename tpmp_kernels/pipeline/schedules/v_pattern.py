"""The repeating pattern of V schedules (Qi et al., 2024, "Pipeline Parallelism with Controllable Memory").

In units of one F, B or W of a chunk, every rank starts a microbatch every 6 units and computes its F and B of both
chunks at fixed times in between: with slopes (a, b, c, e), rank r at

    F of chunk 0   a r               down the V            F of chunk 1   C1 - b r    up again, to the loss on rank 0
    B of chunk 1   C2 + c r          down                  B of chunk 0   C3 - e r    up

The slopes decide memory: a chunk's activation lives from its F to its W, so a rank holds about (a + b + c + e) p / 6 of
them, the same on every one of p ranks where a + e = b + c. W takes the two units that are left.
"""

from itertools import count, product

UNITS = 6
Pass = tuple[bool, int, int]  # whether it is a B, chunk, microbatch


def forwards_and_backwards(ranks: int, microbatches: int, slopes: tuple[int, int, int, int]) -> list[list[Pass]]:
    """For each rank its passes in the order of their times."""
    a, b, c, e = slopes
    first, second, third = _turns(ranks, slopes)
    orders = []
    for rank in range(ranks):
        times = (
            *((a * rank, False, 0), (first - b * rank, False, 1)),
            *((second + c * rank, True, 1), (third - e * rank, True, 0)),
        )
        passes = sorted((time + UNITS * i, *which, i) for time, *which in times for i in range(microbatches))
        orders.append([(backward, chunk, i) for _, backward, chunk, i in passes])
    return orders


def _turns(ranks: int, slopes: tuple[int, int, int, int]) -> tuple[int, int, int]:
    """(C1, C2, C3): as early as the inputs allow, but with different units, modulo 6, for a rank's four passes."""
    a, b, c, e = slopes
    for later in count():
        for x, y in product(range(later + 1), repeat=2):
            if x + y > later:
                continue
            first = (a + b) * (ranks - 1) + 1 + x
            second = first + 1 + y
            third = second + (c + e) * (ranks - 1) + 1 + later - x - y
            times = ((a * r, first - b * r, second + c * r, third - e * r) for r in range(min(ranks, UNITS)))
            if all(len({time % UNITS for time in passes}) == len(passes) for passes in times):
                return first, second, third
    raise AssertionError("turns exist for all slopes that are used")
