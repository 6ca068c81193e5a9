"""Schedules as data: the builders' orders, the lowering, JSON and digests."""

import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpmp_kernels.pipeline.lowering import lower
from tpmp_kernels.pipeline.schedule import Action, Kind, Schedule, Transfer
from tpmp_kernels.pipeline.schedules import SCHEDULES, build
from tpmp_kernels.pipeline.validate import validate

names = st.sampled_from(sorted(SCHEDULES))


def text(schedule: Schedule, rank: int) -> str:
    return " ".join(f"{action.kind}{action.microbatch}" for action in schedule.actions[rank])


def test_orders_are_those_of_the_figures():
    one = build("1f1b", ranks=3, microbatches=4)
    assert [text(one, rank) for rank in range(3)] == [
        "F0 F1 F2 BW0 F3 BW1 BW2 BW3",
        "F0 F1 BW0 F2 BW1 F3 BW2 BW3",
        "F0 BW0 F1 BW1 F2 BW2 F3 BW3",
    ]
    assert text(build("1f1b", ranks=5, microbatches=2), 0) == "F0 F1 BW0 BW1"
    assert text(build("gpipe", ranks=2, microbatches=3), 1) == "F0 F1 F2 BW0 BW1 BW2"
    assert text(build("forward-only", ranks=2, microbatches=3), 1) == "F0 F1 F2"


@pytest.mark.parametrize("name, torch_name", [("1f1b", "Schedule1F1B"), ("gpipe", "ScheduleGPipe")])
def test_orders_are_those_of_torch(name, torch_name):
    torch_schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    theirs_of = getattr(torch_schedules, torch_name)._get_pipeline_order
    kinds = {"FORWARD": Kind.F, "FULL_BACKWARD": Kind.BW}
    for ranks, microbatches in [(2, 2), (3, 5), (4, 8), (8, 32)]:  # torch needs microbatches >= stages
        sizes = SimpleNamespace(_num_stages=ranks, _n_microbatches=microbatches)
        theirs = theirs_of(sizes)
        ours = build(name, ranks=ranks, microbatches=microbatches)
        # The last rank of 1F1B is left out: torch 2.13 numbers its forwards from 1 there, and runs them from 0.
        for rank in range(ranks - (name == "1f1b")):
            computes = [a for a in theirs[rank] if a is not None and a.computation_type.name in kinds]
            assert ours.actions[rank] == tuple(
                Action(kinds[a.computation_type.name], a.stage_index, a.microbatch_index) for a in computes
            )


def test_lowering_of_a_middle_rank():
    steps = lower(build("1f1b", ranks=3, microbatches=2)).programs[1]
    words = [
        f"{step.kind}{step.microbatch}" if isinstance(step, Action) else f"{step.kind} {step.payload}{step.microbatch}"
        for step in steps
    ]
    assert words == [
        *("RECV_POST F0", "RECV_POST F1", "RECV_WAIT F0", "F0", "SEND_POST F0", "RECV_POST B0"),
        *("RECV_WAIT F1", "F1", "SEND_WAIT F0", "SEND_POST F1", "RECV_POST B1"),
        *("RECV_WAIT B0", "BW0", "SEND_POST B0"),
        *("RECV_WAIT B1", "BW1", "SEND_WAIT B0", "SEND_POST B1", "SEND_WAIT F1", "SEND_WAIT B1"),
    ]


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([name for name, entry in SCHEDULES.items() if entry.chunks == 1]),
    st.integers(1, 12),
    st.integers(1, 24),
)
def test_buffers_are_bounded_and_receives_run_one_ahead(name, ranks, microbatches):
    for program in lower(build(name, ranks=ranks, microbatches=microbatches)).programs:
        sends, receives = Counter(), 0
        for step in program:
            if isinstance(step, Transfer):
                change = 1 if step.kind.endswith("POST") else -1
                if step.kind.startswith("SEND"):
                    sends[step.peer] += change
                    assert sends[step.peer] <= 1
                else:
                    receives += change
                    assert receives <= 2
        assert receives == 0
        assert not any(sends.values())


def test_stages_of_one_rank_hand_over_without_a_transfer():
    """Two ranks, four stages in a V (0, 1, 1, 0), two microbatches: only stages 0-1 and 2-3 are apart."""
    F, BW = Kind.F, Kind.BW
    first = [(F, 0, 0), (F, 0, 1), (F, 3, 0), (BW, 3, 0), (F, 3, 1), (BW, 3, 1), (BW, 0, 0), (BW, 0, 1)]
    second = [(F, 1, 0), (F, 2, 0), (F, 1, 1), (F, 2, 1), (BW, 2, 0), (BW, 1, 0), (BW, 2, 1), (BW, 1, 1)]
    actions = tuple(tuple(Action(*action) for action in order) for order in (first, second))
    schedule = Schedule("v", (0, 1, 1, 0), 2, actions)
    report = validate(schedule)
    assert (report.messages, report.peak_live) == (8, (3, 4))
    crossing = {(s.payload, s.stage) for p in lower(schedule).programs for s in p if isinstance(s, Transfer)}
    assert crossing == {("F", 0), ("F", 2), ("B", 3), ("B", 1)}


def test_receives_are_posted_as_the_peer_sends_them():
    """Rank 1 consumes microbatch 1 first; the receive of microbatch 0, sent earlier, is posted before it anyway."""
    orders = [[(Kind.F, 0, 0), (Kind.F, 0, 1)], [(Kind.F, 1, 1), (Kind.F, 1, 0)]]
    actions = tuple(tuple(Action(*action) for action in order) for order in orders)
    schedule = Schedule("crossed", (0, 1), 2, actions, backward=False)
    assert [step.microbatch for step in lower(schedule).programs[1] if step.kind is Kind.RECV_POST] == [0, 1]
    validate(schedule)


def test_a_send_is_not_waited_for_before_its_receive_can_be_posted():
    """Stages 0 to 4 on ranks 0, 2, 0, 1, 2. Rank 0 sends four messages to rank 2 before it does what rank 2 needs to
    get to the third: with one message in flight at most this would deadlock, though the compute orders are sound."""
    orders = [
        [(stage, i) for stage in (0, 2) for i in range(4)],
        [(3, i) for i in range(4)],
        [(stage, i) for i in range(4) for stage in (1, 4)],
    ]
    actions = tuple(tuple(Action(Kind.F, *each) for each in order) for order in orders)
    validate(Schedule("ring", (0, 2, 0, 1, 2), 4, actions, backward=False))


def test_digest_covers_everything_and_is_stable():
    base = build("1f1b", ranks=2, microbatches=2)
    swapped = (base.actions[0], (base.actions[1][1], base.actions[1][0], *base.actions[1][2:]))
    others = [
        Schedule("other", base.placement, 2, base.actions),
        Schedule("1f1b", (1, 0), 2, base.actions),
        Schedule("1f1b", base.placement, 3, base.actions),
        Schedule("1f1b", base.placement, 2, swapped),
        Schedule("1f1b", base.placement, 2, base.actions, backward=False),
    ]
    assert len({base.digest(), *(other.digest() for other in others)}) == 6
    code = "from tpmp_kernels.pipeline.schedules import build; print(build('1f1b', ranks=2, microbatches=2).digest())"
    other_process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other_process.stdout.strip() == base.digest()


def test_unknown_names_and_sizes_are_refused():
    with pytest.raises(ValueError, match=r"'1f1' is unknown; did you mean '1f1b'\? Known: gpipe, 1f1b, 1f1b-eager"):
        build("1f1", ranks=2, microbatches=2)
    with pytest.raises(ValueError, match="schedule gpipe: microbatches is 0; expected at least 1"):
        build("gpipe", ranks=2, microbatches=0)
    with pytest.raises(ValueError, match="schedule gpipe: ranks is 0"):
        build("gpipe", ranks=0, microbatches=1)


def test_schedule_tools_import_no_torch():
    code = (
        "import sys, tpmp_kernels.pipeline.validate, tpmp_kernels.pipeline.draw; "
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
