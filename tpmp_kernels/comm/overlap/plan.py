"""The cost rule: in how many chunks a linear and its collective run. A pure function in seconds and bytes.

Cut in C chunks, a GEMM of G seconds and a collective of latency L and B bytes a second form a pipeline of two stages,
and what stands behind both (the weight gradient's GEMM, W seconds) runs while the last chunks are on the link:

    g = G / C + overhead        c = L + bytes / C / B
    none       G + (L + bytes / B) + W
    chunked    max(g + (C - 1) max(g, c) + c,  C g + W)

A gather in front of the GEMM gives the same sum, with the stages in the other order. Ranks that chose differently would
wait for each other's chunks, so that nothing in here is measured while a model runs: see rates.py.
"""

from dataclasses import dataclass
from functools import lru_cache

MOST_CHUNKS = 64
LEAST_ROWS = 32  # of a chunk: below, a GEMM reads more weights than it multiplies
LEAST_GAIN = 0.05  # of the time of none: less drowns in what the rule leaves out


@dataclass(frozen=True)
class Link:
    """latency in seconds, bandwidth in bytes a second, one direction."""

    latency: float
    bandwidth: float

    def seconds(self, nbytes: float) -> float:
        """What a collective takes that moves so many bytes over each rank's link; nothing takes none."""
        return self.latency + nbytes / self.bandwidth if nbytes else 0.0


@dataclass(frozen=True)
class Costs:
    """Of one pass: seconds of the unsplit GEMM, of what may run behind it, and for each chunk; bytes that move."""

    gemm: float
    nbytes: float
    link: Link
    overhead: float
    behind: float = 0.0

    @property
    def communication(self) -> float:
        return self.link.seconds(self.nbytes)

    @property
    def none(self) -> float:
        """One GEMM, then one collective, then what stands behind."""
        return self.gemm + self.communication + self.behind

    def chunked(self, chunks: int) -> float:
        g = self.gemm / chunks + self.overhead
        c = self.link.seconds(self.nbytes / chunks)
        return max(g + (chunks - 1) * max(g, c) + c, chunks * g + self.behind)


@dataclass(frozen=True)
class Plan:
    """mode "none", "chunked" or "signal". Chunked in one chunk: whole, with what stands behind it under the link."""

    mode: str
    chunks: int
    costs: Costs
    why: str

    @property
    def seconds(self) -> float:
        return self.costs.none if self.mode == "none" else self.costs.chunked(self.chunks)

    @property
    def gain(self) -> float:
        """The share of none's time that the plan is expected to save; negative where chunks were asked for in vain."""
        return 1 - self.seconds / self.costs.none if self.costs.none else 0.0


@lru_cache
def choose(costs: Costs, rows: int, *, overlaps: bool = True, transport: str = "this transport") -> Plan:
    """The plan of mode "auto" for a pass over so many rows: the fastest of 1, 2, 4, .. chunks, or none where little is
    gained."""
    if not costs.communication:
        return Plan("none", 1, costs, "the link costs nothing")
    if not overlaps:
        return Plan("none", 1, costs, f"{transport} moves bytes on the cores that compute, so that nothing would hide")
    chunks = fastest(costs, rows)
    plan = Plan("chunked", chunks, costs, f"the fastest, of at most {_most(rows)} chunks")
    if plan.gain < LEAST_GAIN:
        why = f"{chunks} chunks, the fastest, would gain {100 * plan.gain:.0f} %, less than {100 * LEAST_GAIN:.0f} %"
        return Plan("none", 1, costs, why)
    return plan


def fastest(costs: Costs, rows: int, *, least: int = 1) -> int:
    """The power of two of chunks, from `least` on, that takes the least time; of equals the smallest."""
    candidates = [1 << i for i in range(_most(rows).bit_length()) if 1 << i >= least]
    return min(candidates or [max(1, min(least, rows))], key=lambda chunks: (costs.chunked(chunks), chunks))


def _most(rows: int) -> int:
    return max(1, min(rows // LEAST_ROWS, MOST_CHUNKS))


def bounds(rows: int, chunks: int) -> list[slice]:
    """The rows of each chunk: as even as can be, none empty but the one of no rows at all."""
    chunks = max(1, min(chunks, rows))
    return [slice(i * rows // chunks, (i + 1) * rows // chunks) for i in range(chunks)]
