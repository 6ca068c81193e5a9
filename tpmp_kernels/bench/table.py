"""Rows as text: an aligned table for a terminal, and the cells that the README's tables are made of."""

from collections.abc import Iterable, Sequence

from tpmp_kernels.bench.rows import Row

COLUMNS = ("case", "shape", "dtype", "contender", "median", "p20 - p80", "ratio", "ceiling", "rate", "memory")


def columns(rows: Iterable[Row]) -> tuple[str, ...]:
    """Those of COLUMNS that these rows fill: memory is measured for some suites alone."""
    return COLUMNS if any(row.memory is not None for row in rows) else COLUMNS[:-1]


def cells(row: Row, columns: Sequence[str]) -> tuple[str, ...]:
    """The row as text, one entry for each of `columns`; a contender that could not run shows its reason."""
    return _cells(row)[: len(columns)]


def _cells(row: Row) -> tuple[str, ...]:
    name = (row.case, row.shape, row.dtype, row.contender)
    if row.median is None:
        return (*name, f"cannot run: {row.note}", "", "", "", "", "")
    return (
        *name,
        show_seconds(row.median),
        f"{show_seconds(row.p20)} - {show_seconds(row.p80)}",
        "-" if row.ratio is None else f"{row.ratio:.2f}x",
        "-" if row.ceiling is None else f"{show_percent(row.ceiling)} of {row.ceiling_name}",
        "-" if row.work is None else show_rate(row.work / row.median, row.unit),
        "-" if row.memory is None else show_mebibytes(row.memory),
    )


def table(rows: Iterable[Row]) -> str:
    """An aligned table for a terminal."""
    rows = list(rows)
    header = columns(rows)
    return aligned([header, *(cells(row, header) for row in rows)], reason=header.index("median"))


def aligned(lines: Sequence[Sequence[str]], *, reason: int) -> str:
    """The lines in columns. In a line without a last cell, the one at `reason` is a sentence and widens no column."""
    widths = [max(len(line[i]) for line in lines if i != reason or line[-1]) for i in range(len(lines[0]))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def show_seconds(seconds: float) -> str:
    return _scaled(seconds, ((1, "s"), (1e-3, "ms"), (1e-6, "us")))


def show_percent(fraction: float) -> str:
    return f"{100 * fraction:.{0 if fraction >= 0.1 else 2}f} %"


def show_rate(rate: float, unit: str) -> str:
    return _scaled(rate, tuple((scale, prefix + unit) for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"))))


def show_mebibytes(nbytes: int) -> str:
    return f"{nbytes / 2**20:.0f} MiB"


def _scaled(value: float, units: Sequence[tuple[float, str]]) -> str:
    scale, name = next((each for each in units if value >= each[0]), units[-1])
    scaled = value / scale
    return f"{scaled:.{max(0, 2 - len(str(int(scaled))) + 1)}f} {name}"
