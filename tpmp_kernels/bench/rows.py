"""Result rows: one contender of one case each, made from the timings of one run, and kept in JSON files."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tpmp_kernels.bench.provenance import Provenance
from tpmp_kernels.bench.timing import Timing

OURS = "tpmp"  # a contender of ours is called `tpmp` or `tpmp ...`


@dataclass(frozen=True)
class Row:
    """One contender of one case. Times are seconds of one call.

    `ratio` is the baseline's median over this one's (above 1: faster than the baseline); `ceiling` is the fraction
    reached of `ceiling_name`, a contender of the same run that does only the unavoidable part; `work` is what one
    call does, in units of `unit` x seconds ("FLOP/s", "B/s"); `memory` is the bytes that it needs beside operands and
    results, where that was measured. Where a contender cannot run, `note` says why and the numbers are None.
    """

    suite: str
    case: str
    shape: str
    dtype: str
    contender: str
    median: float | None
    p20: float | None
    p80: float | None
    baseline: str
    ratio: float | None
    ceiling: float | None
    ceiling_name: str
    work: float | None
    unit: str
    threads: int
    device: str
    commit: str
    date: str
    versions: dict[str, str] = field(hash=False)
    note: str = ""
    memory: int | None = None

    @property
    def cell(self) -> tuple[str, str, str, str]:
        return (self.suite, self.case, self.shape, self.dtype)

    @property
    def key(self) -> tuple[str, ...]:
        return (*self.cell, self.contender)

    @property
    def ours(self) -> bool:
        return self.contender.split(" ")[0] == OURS


def rows_of(
    timings: Mapping[str, Timing | str],
    where: Provenance,
    *,
    suite: str,
    case: str,
    shape: str,
    dtype: str,
    baseline: str,
    ceiling: str = "",
    work: float | None = None,
    unit: str = "",
    memory: Mapping[str, int | None] | None = None,
) -> list[Row]:
    """Rows of one case from the timings of one run. A contender that cannot run has a reason in place of a Timing.
    `memory` of a contender: bytes, where they were measured."""
    for role, name in (("baseline", baseline), ("ceiling", ceiling)):
        if name and name not in timings:
            raise ValueError(f"rows_of: {role} {name!r} was not timed; pass one of {', '.join(timings)}")
    shared = {"suite": suite, "case": case, "shape": shape, "dtype": dtype, "baseline": baseline}
    shared |= {"ceiling_name": ceiling, "work": work, "unit": unit, **asdict(where)}
    return [
        Row(
            contender=name,
            ratio=_over(timings, baseline, name),
            ceiling=_over(timings, ceiling, name),
            memory=(memory or {}).get(name),
            **_quantiles(timing),
            **shared,
        )
        for name, timing in timings.items()
    ]


def _quantiles(timing: Timing | str) -> dict:
    if isinstance(timing, str):
        return {"median": None, "p20": None, "p80": None, "note": timing}
    return {"median": _short(timing.median), "p20": _short(timing.quantile(0.2)), "p80": _short(timing.quantile(0.8))}


def _over(timings: Mapping[str, Timing | str], other: str, name: str) -> float | None:
    """How many times as long `other` takes as `name`."""
    pair = (timings.get(other), timings[name])
    return _short(pair[0].median / pair[1].median) if all(isinstance(each, Timing) for each in pair) else None


def _short(value: float) -> float:
    """Five digits: more would be noise that makes every diff long."""
    return float(f"{value:.5g}")


def rows_path(folder: Path, device: str, suite: str) -> Path:
    return folder / device / f"{suite}.json"


def read_rows(path: Path) -> list[Row]:
    """The rows of one file; ValueError where it is not what write_rows writes."""
    try:
        return [Row(**each) for each in json.loads(path.read_text())]
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{path}: not a file of benchmark rows ({error}); restore it or measure again") from error


def write_rows(folder: Path, rows: Iterable[Row]) -> list[Path]:
    """Merge rows into one file for each device and suite, replacing rows of the same key; returns the paths.

    Files are sorted by key with one row a line, so that measuring one case again changes the lines of that case.
    """
    files: dict[Path, dict[tuple[str, ...], Row]] = {}
    for row in rows:
        path = rows_path(folder, row.device, row.suite)
        if path not in files:
            files[path] = {old.key: old for old in read_rows(path)} if path.exists() else {}
        files[path][row.key] = row
    for path, merged in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(asdict(merged[key]), ensure_ascii=False) for key in sorted(merged)]
        path.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    return sorted(files)
