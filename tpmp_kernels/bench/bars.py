"""Bars: how fast a contender has to be, and which rows of a run reach theirs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tpmp_kernels.bench.rows import Row


@dataclass(frozen=True)
class Bar:
    """`contender` is to be at least `speed` times as fast as `rival` in that case: medians of one run."""

    case: str
    shape: str
    contender: str
    rival: str
    speed: float


def verdict(bars: Iterable[Bar], rows: Sequence[Row]) -> str:
    """One line: how many bars are met, and how far each of the others is. A bar without its rows is not counted."""
    medians = {(row.case, row.shape, row.contender): row.median for row in rows}
    met, unmet = 0, []
    for bar in bars:
        if not {(bar.case, bar.shape, name) for name in (bar.contender, bar.rival)} <= medians.keys():
            continue
        ours, theirs = (medians[bar.case, bar.shape, name] for name in (bar.contender, bar.rival))
        if ours and theirs and theirs / ours >= bar.speed:
            met += 1
        else:
            reached = f"{theirs / ours:.2f}x of" if ours and theirs else "cannot run beside"
            unmet.append(f"{bar.case}, {bar.shape}: {bar.contender} {reached} {bar.rival}, bar {bar.speed:.2f}x")
    return f"bars: {met} of {met + len(unmet)} met" + "".join(f"\n  unmet: {each}" for each in unmet)
