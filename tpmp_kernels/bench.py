"""Timing and result rows, behind `tpmp bench`, `tpmp compare` and benchmarks/.

    timings = interleave({"eager": eager, "tpmp": ours}, rounds=20, iterations=10)
    rows = rows_of(timings, provenance(threads=1), suite="kernels", case="linear+gelu", shape="512x3072x768",
                   dtype="bf16", baseline="eager")
    write_rows(Path("benchmarks/results"), rows)

A claim here is a ratio to a baseline measured in the same run: contenders take turns, so that a machine that slows
down slows all of them. Counts are fixed and the order of turns is a function of the round alone, because near a
collective every rank must make the same calls. A row keeps where it was measured, and losing rows are kept.
"""

import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from tpmp_kernels import __version__

OURS = "tpmp"  # a contender of ours is called `tpmp` or `tpmp ...`
_ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("torch", "triton", "numpy")


@dataclass(frozen=True)
class Timing:
    """The samples of one contender, one for each round: seconds of one call, averaged over that round's calls."""

    samples: tuple[float, ...]

    def quantile(self, q: float) -> float:
        """Seconds below which the share `q` of the samples lies, interpolated between neighbours."""
        ordered = sorted(self.samples)
        position = q * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


def turns(names: Sequence[str], rounds: int) -> Iterator[list[str]]:
    """The order of contenders in each round: rotated by one a round and mirrored every second cycle.

    Each contender is first equally often and follows each neighbour from both sides, and no rank has to be told.
    """
    for r in range(rounds):
        start = r % len(names)
        order = [*names[start:], *names[:start]]
        yield order[::-1] if r // len(names) % 2 else order


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    iterations: int,
    warmup: int = 1,
    sync: Callable[[], object] = lambda: None,
    before: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Time the contenders in turns: `warmup` untimed rounds, then `rounds`, each of `iterations` calls a contender.

    `sync` waits for the device (torch.cuda.synchronize) and runs on both sides of the clock. `before` runs ahead of
    every contender's turn outside the clock: it lines ranks up (a barrier) or restores what calls write into.
    The number of calls depends on the arguments alone, never on time, so collectives are safe inside.
    Inputs must be random: a GPU multiplies zeros at less power and higher clocks than data.
    """
    if not contenders:
        raise ValueError("interleave: there are no contenders; pass at least one callable by name")
    if rounds < 1 or iterations < 1 or warmup < 0:
        raise ValueError(
            f"interleave: rounds={rounds}, iterations={iterations}, warmup={warmup}; "
            "pass at least one round of one iteration and no negative warmup"
        )
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for order in turns(list(contenders), warmup + rounds):
        for name in order:
            before()
            samples[name].append(_clock(contenders[name], iterations, sync))
    return {name: Timing(tuple(each[warmup:])) for name, each in samples.items()}


def _clock(call: Callable[[], object], iterations: int, sync: Callable[[], object]) -> float:
    sync()
    start = time.perf_counter()
    for _ in range(iterations):
        call()
    sync()
    return (time.perf_counter() - start) / iterations


def slowest(ranks: Sequence[Mapping[str, Timing]]) -> dict[str, Timing]:
    """Merge what every rank measured: each sample becomes that of the slowest rank, for the group waits for it."""
    return {
        name: Timing(tuple(max(group) for group in zip(*(rank[name].samples for rank in ranks), strict=True)))
        for name in ranks[0]
    }


def rotating(call: Callable, inputs: Sequence[tuple]) -> Callable[[], object]:
    """A callable that steps through `inputs` at each call, so that operands come from memory and not from a cache."""
    position = -1

    def step():
        nonlocal position
        position = (position + 1) % len(inputs)
        return call(*inputs[position])

    return step


def gemm_flop(m: int, n: int, k: int) -> int:
    return 2 * m * n * k


def bus_bytes(kind: str, nbytes: int, ranks: int) -> float:
    """Bytes of one call that cross the slowest link of the best algorithm, as nccl-tests defines busbw."""
    factors = {"all_reduce": 2 * (ranks - 1) / ranks, "all_gather": (ranks - 1) / ranks, "send": 1.0}
    factors["reduce_scatter"] = factors["all_gather"]
    if kind not in factors:
        raise ValueError(f"bus_bytes: kind is {kind!r}; pass one of {', '.join(sorted(factors))}")
    return factors[kind] * nbytes


@dataclass(frozen=True)
class Provenance:
    """Where and when rows were measured: one object for each device of a run."""

    device: str
    threads: int
    commit: str
    date: str
    versions: dict[str, str]


def provenance(device: str = "cpu", *, threads: int, date: str | None = None) -> Provenance:
    """Describe this machine and source tree; `device` is "cpu" or "cuda", `date` that of the run, by default now."""
    return Provenance(
        device=device_slug(device),
        threads=threads,
        commit=commit(),
        date=date or datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        versions=versions(),
    )


def device_slug(device: str = "cpu") -> str:
    """A name for a folder: cpu-<model>-<n>core, or the name of the current GPU."""
    if device != "cpu":
        import torch

        return _slug(torch.cuda.get_device_name())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"cpu-{_slug(_cpu_model())}-{cores}core"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1) if found else platform.processor() or platform.machine()


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", text.lower())).strip("-")


def commit(root: Path = _ROOT) -> str:
    """The short commit of the source tree with -dirty where it differs, or "unknown" outside of a checkout.

    Rows and the tables made from them do not count as a difference: writing them must not taint the next suite.
    """
    if _git(root, "rev-parse", "--show-toplevel") != str(root):
        return "unknown"  # installed into some other project's tree
    head = _git(root, "rev-parse", "--short=10", "HEAD")
    changes = _git(root, "status", "--porcelain", "--", ".", ":!benchmarks/results", ":!README.md")
    return head + ("-dirty" if changes else "") if head else "unknown"


def _git(root: Path, *args: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "tpmp_kernels": __version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


@dataclass(frozen=True)
class Row:
    """One contender of one case. Times are seconds of one call.

    `ratio` is the baseline's median over this one's (above 1: faster than the baseline); `ceiling` is the fraction
    reached of `ceiling_name`, a contender of the same run that does only the unavoidable part; `work` is what one
    call does, in units of `unit` x seconds ("FLOP/s", "B/s"). Where a contender cannot run, `note` says why and the
    numbers are None.
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
) -> list[Row]:
    """Rows of one case from the timings of one run. A contender that cannot run has a reason in place of a Timing."""
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


COLUMNS = ("case", "shape", "dtype", "contender", "median", "p20 - p80", "ratio", "ceiling", "rate")


def cells(row: Row) -> tuple[str, ...]:
    """The row as text, one entry for each of COLUMNS; a contender that could not run shows its reason."""
    name = (row.case, row.shape, row.dtype, row.contender)
    if row.median is None:
        return (*name, f"cannot run: {row.note}", "", "", "", "")
    return (
        *name,
        show_seconds(row.median),
        f"{show_seconds(row.p20)} - {show_seconds(row.p80)}",
        "-" if row.ratio is None else f"{row.ratio:.2f}x",
        "-" if row.ceiling is None else f"{show_percent(row.ceiling)} of {row.ceiling_name}",
        "-" if row.work is None else show_rate(row.work / row.median, row.unit),
    )


def table(rows: Iterable[Row]) -> str:
    """An aligned table for a terminal."""
    lines = [COLUMNS, *map(cells, rows)]
    reason = COLUMNS.index("median")
    widths = [max(len(line[i]) for line in lines if i != reason or line[-1]) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def show_seconds(seconds: float) -> str:
    return _scaled(seconds, ((1, "s"), (1e-3, "ms"), (1e-6, "us")))


def show_percent(fraction: float) -> str:
    return f"{100 * fraction:.{0 if fraction >= 0.1 else 2}f} %"


def show_rate(rate: float, unit: str) -> str:
    return _scaled(rate, tuple((scale, prefix + unit) for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"))))


def _scaled(value: float, units: Sequence[tuple[float, str]]) -> str:
    scale, name = next((each for each in units if value >= each[0]), units[-1])
    scaled = value / scale
    return f"{scaled:.{max(0, 2 - len(str(int(scaled))) + 1)}f} {name}"
