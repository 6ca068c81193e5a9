"""The trace: what Perfetto requires of every entry, and that computes, transfers and memory are all there."""

import json
from fractions import Fraction

import pytest

from tpmp_kernels.pipeline.costs import Costs
from tpmp_kernels.pipeline.draw import chrome_trace, events_trace
from tpmp_kernels.pipeline.schedule import Event
from tpmp_kernels.pipeline.schedules import build
from tpmp_kernels.pipeline.simulate import simulate

REQUIRED = {
    "M": {"pid", "name", "args"},
    "X": {"pid", "tid", "name", "cat", "ts", "dur", "args"},
    "C": {"pid", "name", "ts", "args"},
}


def entries(trace: dict, phase: str) -> list[dict]:
    """As they are read back from JSON."""
    return [entry for entry in json.loads(json.dumps(trace))["traceEvents"] if entry["ph"] == phase]


@pytest.mark.parametrize("name", ["1f1b", "dualpipe-v"])
def test_a_simulated_step_is_complete(name):
    simulation = simulate(
        build(name, ranks=3, microbatches=7), Costs(latency=Fraction(1, 2), activation=Fraction(3, 2))
    )
    trace = chrome_trace(simulation)
    assert set(trace) == {"traceEvents", "displayTimeUnit"}
    for entry in trace["traceEvents"]:
        assert REQUIRED[entry["ph"]] <= set(entry)
        assert entry.get("ts", 0) >= 0 and entry.get("dur", 0) >= 0
    drawn = [
        (x["pid"], x["cat"], x["args"].get("stage"), x["args"].get("microbatch"), x["ts"], x["ts"] + x["dur"])
        for x in entries(trace, "X")
    ]
    assert drawn == [
        (rank, event.kind, event.stage, event.microbatch, event.start * 1000, event.end * 1000)
        for rank, row in enumerate(simulation.events())
        for event in row
    ], "a unit is one millisecond, ts in microseconds"
    assert {(x["cat"] == "comm", x["tid"]) for x in entries(trace, "X")} == {(False, 0), (True, 1)}
    for rank in range(3):
        counted = [(c["ts"], c["args"]["microbatches"]) for c in entries(trace, "C") if c["pid"] == rank]
        assert counted == [(time * 1000, level) for time, level in simulation.memory(rank)]


def test_names():
    trace = chrome_trace(simulate(build("1f1b", ranks=2, microbatches=2), Costs(latency=1)), unit=2)
    assert [x["name"] for x in entries(trace, "X") if x["pid"] == 0] == ["F0", "F1", "comm", "BW0", "comm", "BW1"]
    assert entries(trace, "X")[1]["ts"] == 2e6
    processes = {m["pid"]: m["args"]["name"] for m in entries(trace, "M") if m["name"] == "process_name"}
    threads = {(m["pid"], m["tid"]): m["args"]["name"] for m in entries(trace, "M") if m["name"] == "thread_name"}
    assert processes == {0: "rank 0", 1: "rank 1"}
    assert set(threads) == {(0, 0), (0, 1), (1, 0), (1, 1)} and threads[1, 0] == "compute"


def test_measured_events():
    events = [[Event("F", 0, 3, 1.5, 2.0), Event("comm", None, None, 2.0, 2.5)], [Event("opt", None, None, 2.5, 3.0)]]
    trace = events_trace(events)
    assert [(x["pid"], x["tid"], x["name"], x["ts"], x["dur"], x["args"]) for x in entries(trace, "X")] == [
        (0, 0, "F3", 1.5e6, 5e5, {"stage": 0, "microbatch": 3}),
        (0, 1, "comm", 2e6, 5e5, {}),
        (1, 0, "opt", 2.5e6, 5e5, {}),
    ]
    assert not entries(trace, "C")


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="unit is 0; expected seconds above 0"):
        events_trace([[]], unit=0)
