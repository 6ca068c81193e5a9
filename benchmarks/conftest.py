"""The pytest side of the benchmarks: `compare` times one case, and the session ends with one table, its rows, and the
BARS of the modules that took part.

    def test_gelu(compare):
        compare(lambda: interleave({...}, rounds=20, iterations=10), case="gelu", shape="512x768", dtype="bf16",
                baseline="eager")

pytest-benchmark runs the whole measurement as one pedantic call (one round, one iteration, so exactly once) and keeps
the medians in extra_info for its --benchmark-json; the clock is tpmp_kernels.bench, because contenders must take turns
and pytest-benchmark times one callable after the other. Rows go below $OUT, by default to benchmarks/results/.
"""

import os
from pathlib import Path

import pytest
import torch

from tpmp_kernels import bench

_ROWS = pytest.StashKey[list]()
_BARS = pytest.StashKey[list]()
_PLACES = pytest.StashKey[dict]()
_RESULTS = Path(__file__).parent / "results"


def pytest_configure(config):
    config.option.benchmark_quiet = True  # its table shows one number for all contenders of a case
    config.stash[_ROWS] = []
    config.stash[_BARS] = []
    config.stash[_PLACES] = {}


@pytest.fixture
def one_thread():
    """One thread for every contender; torch.compile bakes the number in when it compiles."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def compare(benchmark, request):
    """`compare(measure, case=..., shape=..., dtype=..., baseline=...)` turns what `measure()` timed into rows.

    `measure` returns {contender: Timing, or the reason why it cannot run}; the remaining arguments are those of
    bench.rows_of, and `device` ("cpu" or "cuda") and `threads` (by default those of this process) say where it ran.
    """

    bars = request.config.stash[_BARS]

    def run(measure, *, device: str = "cpu", threads: int | None = None, **names) -> list[bench.Row]:
        timings = benchmark.pedantic(measure, rounds=1, iterations=1)
        where = _place(request.config, device, threads)
        rows = bench.rows_of(timings, where, suite=request.module.SUITE, **names)
        benchmark.extra_info.update({row.contender: row.median if row.median else row.note for row in rows})
        request.config.stash[_ROWS].extend(rows)
        bars.extend(bar for bar in getattr(request.module, "BARS", ()) if bar not in bars)
        return rows

    return run


def _place(config, device: str, threads: int | None) -> bench.Provenance:
    """One provenance for each device and thread count: rows of one session carry one date, which says that they
    may be compared with each other."""
    places = config.stash[_PLACES]
    threads = threads or torch.get_num_threads()
    if (device, threads) not in places:
        first = next(iter(places.values()), None)
        places[device, threads] = bench.provenance(device, threads=threads, date=first.date if first else None)
    return places[device, threads]


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[_ROWS]
    if not rows:
        return
    paths = bench.write_rows(Path(os.environ.get("OUT") or _RESULTS), rows)
    first = rows[0]
    terminalreporter.section("benchmarks")
    for path in paths:
        terminalreporter.write_line(f"rows: {path}")
    terminalreporter.write_line(f"{first.device}, commit {first.commit}, torch {first.versions['torch']}")
    terminalreporter.write_line(bench.table(rows))
    if config.stash[_BARS]:
        terminalreporter.write_line(bench.verdict(config.stash[_BARS], rows))
