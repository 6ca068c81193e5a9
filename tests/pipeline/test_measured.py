"""A pass that ran becomes what the simulator gives: on times made by hand, and on those that a simulated pass has."""

import pytest

from tpmp_kernels.pipeline.costs import Costs
from tpmp_kernels.pipeline.lowering import lower
from tpmp_kernels.pipeline.measured import exposed_transfer, measured
from tpmp_kernels.pipeline.schedule import Action, Kind
from tpmp_kernels.pipeline.schedules import build
from tpmp_kernels.pipeline.simulate import simulate

POSTS = (Kind.SEND_POST, Kind.RECV_POST)


def played(lowered, simulation) -> list[list[tuple[float, float]]]:
    """The times that each step of the programs has where the computes run when the simulation says: posts take none,
    and a wait lasts until both ends have posted."""
    posted: dict[tuple, float] = {}
    while True:
        before, rows = dict(posted), []
        for program, starts, ends in zip(lowered.programs, simulation.starts, simulation.ends, strict=True):
            row, clock, computes = [], 0.0, iter(zip(starts, ends, strict=True))
            for step in program:
                start = clock
                if type(step) is Action:
                    start, clock = next(computes)
                elif step.kind in POSTS:
                    posted[step[1:4]] = max(clock, before.get(step[1:4], 0.0))
                else:
                    clock = max(clock, before.get(step[1:4], 0.0))
                row.append((start, clock))
            rows.append(row)
        if posted == before:
            return rows


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb-h1", "zb-v", "interleaved-1f1b"])
def test_a_simulated_pass_is_found_again(name):
    lowered = lower(build(name, ranks=3, microbatches=6))
    stages = lowered.schedule.stages
    costs = Costs(F=[3.0] * stages, B=[4.0 + s for s in range(stages)], W=[2.0] * stages)
    expected = simulate(lowered, costs)
    found = measured(lowered, [[(a + 50, b + 50) for a, b in row] for row in played(lowered, expected)])
    assert found.makespan == expected.makespan and found.busy == expected.busy
    assert [list(map(tuple, each)) for each in (found.starts, found.ends)] == [
        list(map(tuple, each)) for each in (expected.starts, expected.ends)
    ]
    again = simulate(lowered, found.costs)
    assert (again.starts, again.makespan) == (expected.starts, expected.makespan)
    assert found.bubble_ratio == expected.bubble_ratio


def test_a_wait_is_exposed_transfer_from_where_both_ends_have_posted():
    """Rank 0 sends F0.0 at 2.0; rank 1 has waited since 0.5 and gets it at 2.25."""
    lowered = lower(build("forward-only", ranks=2, microbatches=1))
    times = {
        0: {Kind.F: (0.0, 2.0), Kind.SEND_POST: (2.0, 2.0), Kind.SEND_WAIT: (2.0, 2.5)},
        1: {Kind.RECV_POST: (0.0, 0.5), Kind.RECV_WAIT: (0.5, 2.25), Kind.F: (2.25, 5.0)},
    }
    found = measured(lowered, [[times[r][step.kind] for step in p] for r, p in enumerate(lowered.programs)])
    assert found.blocked == ([(2.0, 2.5)], [(2.0, 2.25)]) and found.exposed == (0.5, 0.25)
    assert exposed_transfer(lowered, [[times[r][s.kind] for s in p] for r, p in enumerate(lowered.programs)]) == (
        0.5,
        0.25,
    )
    assert found.makespan == 5.0 and found.busy == (2.0, 2.75)
    assert found.costs.F == [2.0, 2.75] and found.costs.latency == 0.375


def test_times_of_another_schedule_are_refused():
    lowered = lower(build("1f1b", ranks=2, microbatches=2))
    with pytest.raises(ValueError, match="measured: rank 0 has 1 times for the 12 steps of its program; pass"):
        measured(lowered, [[(0.0, 1.0)], []])
