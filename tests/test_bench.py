"""The clock calls what it should and no more, rows survive the disk, and ratios are what they are called."""

import json
import random
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tpmp_kernels import bench
from tpmp_kernels.bench import Bar, Timing, interleave, read_rows, rows_of, timing, verdict, write_rows

WHERE = bench.Provenance("cpu-test-2core", 1, "0123456789", "2026-01-02T03:04:05Z", {"torch": "2.13.0"})
CASE = {"suite": "kernels", "case": "gelu", "shape": "4x4", "dtype": "fp32", "baseline": "eager"}


def rows(ours: float = 0.5, **changes) -> list[bench.Row]:
    timings = {"eager": Timing((1.0, 3.0, 2.0)), "GEMM": Timing((0.25,)), "tpmp": Timing((ours,))}
    return rows_of(timings, WHERE, **(CASE | {"ceiling": "GEMM"} | changes))


def test_interleave_takes_turns_with_fixed_counts():
    calls: list[str] = []
    contenders = {name: lambda name=name: calls.append(name) for name in "abc"}
    timings = interleave(
        contenders, rounds=5, iterations=2, warmup=1, before=lambda: calls.append("|"), sync=lambda: calls.append(".")
    )
    order = ["abc", "bca", "cab", "cba", "acb", "bac"]  # rotated; mirrored in the second cycle
    assert "".join(calls) == "".join(f"|.{name}{name}." for turn in order for name in turn)
    assert {name: len(timing.samples) for name, timing in timings.items()} == {"a": 5, "b": 5, "c": 5}


def test_turns_are_the_same_whatever_the_clock_says():
    assert list(bench.turns(["a", "b"], 4)) == [["a", "b"], ["b", "a"], ["b", "a"], ["a", "b"]]


def test_samples_are_seconds_of_one_call(monkeypatch):
    now = 0.0

    def call():
        nonlocal now
        now += 0.25

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    assert interleave({"a": call}, rounds=3, iterations=4)["a"].samples == (0.25, 0.25, 0.25)


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"iterations": 0}, {"warmup": -1}])
def test_interleave_refuses_what_measures_nothing(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        interleave({"a": int}, **({"rounds": 1, "iterations": 1} | wrong))
    with pytest.raises(ValueError, match="no contenders"):
        interleave({}, rounds=1, iterations=1)


def test_quantiles():
    timing = Timing(tuple(random.Random(0).sample([float(i) for i in range(11)], 11)))
    assert (timing.quantile(0.2), timing.median, timing.quantile(0.8)) == (2.0, 5.0, 8.0)
    assert Timing((1.0, 2.0)).quantile(0.8) == pytest.approx(1.8)
    assert Timing((7.0,)).quantile(0.2) == 7.0


def test_slowest_rank_counts_in_every_sample():
    merged = bench.slowest([{"a": Timing((1.0, 5.0))}, {"a": Timing((2.0, 4.0))}])
    assert merged == {"a": Timing((2.0, 5.0))}


def test_rotating_steps_through_its_inputs():
    step = bench.rotating(lambda x, y: x + y, [(1, 10), (2, 20), (3, 30)])
    assert [step() for _ in range(4)] == [11, 22, 33, 11]


def test_ratio_is_speed_over_the_baseline_and_ceiling_the_fraction_reached():
    eager, gemm, ours = rows(ours=0.5)
    assert (eager.median, eager.ratio, eager.ceiling) == (2.0, 1.0, 0.125)
    assert (gemm.ratio, gemm.ceiling) == (8.0, 1.0)
    assert (ours.ratio, ours.ceiling, ours.ceiling_name) == (4.0, 0.5, "GEMM")
    assert ours.ours and not eager.ours and not gemm.ours
    assert rows(ours=4.0)[2].ratio == 0.5  # slower than the baseline is below 1


def test_contender_that_cannot_run_is_a_row_with_its_reason():
    made = rows_of({"eager": Timing((1.0,)), "tpmp": "no compiler"}, WHERE, **CASE)
    assert (made[1].median, made[1].ratio, made[1].note) == (None, None, "no compiler")
    assert "cannot run: no compiler" in bench.table(made)
    made = rows_of({"eager": "no torch", "tpmp": Timing((1.0,))}, WHERE, **CASE)
    assert made[1].median == 1.0 and made[1].ratio is None


def test_baseline_must_be_timed_in_the_same_run():
    with pytest.raises(ValueError, match="baseline 'gloo' was not timed; pass one of eager"):
        rows(baseline="gloo")


def test_rows_survive_the_disk_in_any_order(tmp_path):
    made = rows()
    (path,) = write_rows(tmp_path, made)
    assert path == tmp_path / "cpu-test-2core" / "kernels.json"
    assert sorted(read_rows(path), key=lambda row: row.key) == sorted(made, key=lambda row: row.key)
    first = path.read_text()
    (other,) = write_rows(tmp_path / "other", reversed(made))
    assert other.read_text() == first
    assert len(first.splitlines()) == 2 + len(made)  # one row a line, so that diffs are small


def test_writing_replaces_rows_of_the_same_key_only(tmp_path):
    write_rows(tmp_path, [*rows(ours=0.5), *rows(ours=0.5, shape="8x8")])
    (path,) = write_rows(tmp_path, rows(ours=1.0))
    found = {(row.shape, row.contender): row.ratio for row in read_rows(path)}
    assert len(found) == 6
    assert (found["4x4", "tpmp"], found["8x8", "tpmp"]) == (2.0, 4.0)


def test_one_file_for_each_suite_and_device(tmp_path):
    paths = write_rows(tmp_path, [*rows(), *rows(suite="comm"), replace(rows()[0], device="gpu")])
    assert [str(path.relative_to(tmp_path)) for path in paths] == [
        "cpu-test-2core/comm.json",
        "cpu-test-2core/kernels.json",
        "gpu/kernels.json",
    ]


@pytest.mark.parametrize("text", ["{", '[{"suite": "kernels"}]'])
def test_file_that_holds_no_rows_is_named(tmp_path, text):
    path = tmp_path / "kernels.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"kernels\.json: not a file of benchmark rows"):
        read_rows(path)


def test_table_is_aligned():
    lines = bench.table(rows(work=1e9, unit="FLOP/s")).splitlines()
    starts = [lines[0].index(name) for name in ("contender", "median", "ratio", "rate")]
    assert [[line[start:].split(" ")[0] for start in starts] for line in lines[1:]] == [
        ["eager", "2.00", "1.00x", "500"],
        ["GEMM", "250", "8.00x", "4.00"],
        ["tpmp", "500", "4.00x", "2.00"],
    ]


def test_units():
    assert [bench.show_seconds(s) for s in (2.5, 0.0123, 4.56e-6, 789e-6)] == [
        "2.50 s",
        "12.3 ms",
        "4.56 us",
        "789 us",
    ]
    assert [bench.show_percent(f) for f in (1.0, 0.876, 0.0028)] == ["100 %", "88 %", "0.28 %"]
    assert bench.show_rate(7.9e14, "FLOP/s") == "790 TFLOP/s"
    assert bench.gemm_flop(2, 3, 4) == 48
    kinds = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send")
    assert [bench.bus_bytes(kind, 8, 4) for kind in kinds] == [12, 6, 6, 6, 8, 8]
    with pytest.raises(ValueError, match="kind is 'gather'"):
        bench.bus_bytes("gather", 8, 4)


def test_bars_are_compared_with_medians_of_the_run():
    made = rows(ours=0.5)  # eager 2, GEMM 0.25
    case = ("gelu", "4x4", "tpmp")
    bars = [Bar(*case, "eager", 4), Bar(*case, "GEMM", 0.75), Bar("another case", *case[1:], "eager", 9)]
    assert verdict(bars, made) == "bars: 1 of 2 met\n  unmet: gelu, 4x4: tpmp 0.50x of GEMM, bar 0.75x"
    cannot = rows_of({"eager": Timing((1.0,)), "tpmp": "no compiler"}, WHERE, **CASE)
    assert verdict(bars[:1], cannot) == "bars: 0 of 1 met\n  unmet: gelu, 4x4: tpmp cannot run beside eager, bar 4.00x"
    assert verdict(bars, []) == "bars: 0 of 0 met"


def test_bars_and_tables_of_memory():
    made = rows_of(
        {"eager": Timing((2.0,)), "tpmp": Timing((2.0,))}, WHERE, **CASE, memory={"eager": 30 << 20, "tpmp": 4 << 20}
    )
    bar = Bar("gelu", "4x4", "tpmp", "eager", 10, "fp32", "memory")
    assert verdict([bar], made) == "bars: 0 of 1 met\n  unmet: gelu, 4x4, fp32, memory: tpmp 7.50x of eager, bar 10.00x"
    assert verdict([replace(bar, times=7.5)], made) == "bars: 1 of 1 met"
    assert verdict([replace(bar, dtype="bf16")], made) == "bars: 0 of 0 met"
    assert [line.split()[-2:] for line in bench.table(made).splitlines()[1:]] == [["30", "MiB"], ["4", "MiB"]]
    assert "memory" not in bench.table(rows(ours=0.5))


def git(root: Path, *args: str) -> None:
    names = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    subprocess.run(["git", "-C", str(root), *names, *args], check=True, capture_output=True)


def test_commit_says_dirty_unless_only_rows_or_tables_changed(tmp_path):
    root = tmp_path.resolve()
    assert bench.commit(root) == "unknown"
    git(root, "init", "-q")
    (root / "README.md").write_text("a")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "first")
    clean = bench.commit(root)
    assert len(clean) == 10
    write_rows(root / "benchmarks" / "results", rows())
    (root / "README.md").write_text("b")
    assert bench.commit(root) == clean
    (root / "kernel.py").write_text("changed")
    assert bench.commit(root) == f"{clean}-dirty"
    assert bench.commit(root / "benchmarks") == "unknown"  # a folder of another project is not our tree


def test_provenance_describes_this_machine():
    where = bench.provenance(threads=1)
    assert where.device.startswith("cpu-") and where.device.endswith("core")
    assert where.device == where.device.lower() and not set(where.device) & set(" ()@/")
    assert {"python", "torch", "triton", "numpy", "tpmp_kernels"} <= where.versions.keys()
    json.dumps(where.versions)
