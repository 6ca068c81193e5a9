"""ZB-V (Qi et al., 2024): zero bubble within the memory of 1F1B, from a V and from W that fill the gaps.

Two ranks, stages 0 and 3 on rank 0 and 1 and 2 on rank 1 (a V), four microbatches, all times equal:

    rank 0   0F0 0F1 0F2 3F0 3B0 3W0 3F1 3B1 0B0 3W1 0F3 0W0 3F2 3B2 0B1 3W2 0W1 3F3 3B3 0B2 3W3 0B3 0W2 0W3
    rank 1       1F0 2F0 1F1 2F1 2B0 1B0 2W0 1F2 1W0 2F2 2B1 1B1 2W1 1F3 1W1 2F3 2B2 1B2 2B3 1B3 2W2 1W2 2W3 1W3

First and last stage are on rank 0, so loss and embedding meet, and the turn on the last rank needs no transfer. Between
its own first F and last W no rank idles where F = B = W and there are 2 p microbatches; elsewhere the order is searched
for: the costs decide which of a few rules leaves the smallest gap.
"""

from tpmp_kernels.pipeline.costs import Costs
from tpmp_kernels.pipeline.schedule import Kind, Schedule
from tpmp_kernels.pipeline.schedules.greedy import Placed, Rules, place
from tpmp_kernels.pipeline.schedules.placement import folded
from tpmp_kernels.pipeline.schedules.v_pattern import forwards_and_backwards

# The widest V first, then those of V-Half and V-Min, for limits that it does not keep.
_SLOPES = (1, 5, 1, 5), (2, 1, 2, 1), (1, 1, 1, 1)
# Whether a W may delay an F, and a B; whether only where it would otherwise wait for longer than half a W.
_FILLS = (True, True, False), (True, False, False), (False, True, True), (False, False, False)


def build(ranks: int, microbatches: int, costs: Costs, *, limit: int | None = None) -> Schedule:
    """limit: of live chunk activations on a rank, 2 ranks if None. Raises ValueError for a limit outside of
    2 ((ranks + 4) // 3) to 2 ranks."""
    lowest, highest = min(2 * ((ranks + 4) // 3), 2 * ranks), 2 * ranks
    limit = highest if limit is None else limit
    if not lowest <= limit <= highest:
        raise ValueError(
            f"schedule zb-v: limit is {limit}; expected {lowest} to {highest} live chunk activations on {ranks} ranks"
        )
    placed = next(filter(None, (_best(ranks, microbatches, costs, limit, slopes) for slopes in _SLOPES)))
    return Schedule("zb-v", folded(ranks), microbatches, tuple(map(tuple, placed.orders)))


def _best(ranks: int, microbatches: int, costs: Costs, limit: int, slopes: tuple[int, int, int, int]) -> Placed | None:
    """The smallest bubble of all rules; the first of equals, so that every machine finds the same order."""
    orders = forwards_and_backwards(ranks, microbatches, slopes)
    half = min(costs.times(2 * ranks, ranks)[Kind.W]) / 2
    best = None
    for ahead in (True, False):
        for fill_f, fill_b, patient in _FILLS:
            rules = Rules(limit, ahead, fill_f, fill_b, tolerated=half if patient else 0)
            placed = place(orders, microbatches, costs, rules)
            if placed is not None and (best is None or placed.bubble < best.bubble):
                best = placed
            if best is not None and best.bubble == 0:
                return best
        if best is not None:  # what may start ahead never did better in its turn
            return best
    return None


def peak_live(rank: int, ranks: int, microbatches: int) -> int:
    return min(2 * microbatches, 2 * ranks)
