"""Bars: how fast or how sparing a contender has to be, and which rows of a run reach theirs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tpmp_kernels.bench.rows import Row


@dataclass(frozen=True)
class Bar:
    """`contender` is to need at most 1 / `times` of what `rival` needs in that case: of time, medians of one run, or of
    `memory`. Without a `dtype` the case has one."""

    case: str
    shape: str
    contender: str
    rival: str
    times: float
    dtype: str = ""
    quantity: str = "median"


def verdict(bars: Iterable[Bar], rows: Sequence[Row]) -> str:
    """One line: how many bars are met, and how far each of the others is. A bar without its rows is not counted."""
    met, unmet = 0, []
    for bar in bars:
        found = [row for row in rows if (row.case, row.shape) == (bar.case, bar.shape) and bar.dtype in ("", row.dtype)]
        values = {row.contender: getattr(row, bar.quantity) for row in found}
        if not {bar.contender, bar.rival} <= values.keys():
            continue
        ours, theirs = values[bar.contender], values[bar.rival]
        if ours and theirs and theirs / ours >= bar.times:
            met += 1
        else:
            reached = f"{theirs / ours:.2f}x of" if ours and theirs else "cannot run beside"
            case = ", ".join(filter(None, (bar.case, bar.shape, bar.dtype, bar.quantity.replace("median", ""))))
            unmet.append(f"{case}: {bar.contender} {reached} {bar.rival}, bar {bar.times:.2f}x")
    return f"bars: {met} of {met + len(unmet)} met" + "".join(f"\n  unmet: {each}" for each in unmet)
