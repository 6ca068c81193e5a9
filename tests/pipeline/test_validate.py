"""The validator: every schedule as built passes, every fault that matters is refused, and it is fast enough."""

import gc
import hashlib
import math
import multiprocessing
import random
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants import mutate_schedule, mutate_transfers, runs_right

from tpmp_kernels.errors import ScheduleError
from tpmp_kernels.pipeline.costs import Costs
from tpmp_kernels.pipeline.lowering import Lowered, lower
from tpmp_kernels.pipeline.schedule import Action, Group, Kind, Schedule, Transfer
from tpmp_kernels.pipeline.schedules import SCHEDULES, build, peak_live
from tpmp_kernels.pipeline.simulate import simulate
from tpmp_kernels.pipeline.validate import Report, validate


def drawn(rng: random.Random, ranks: int, chunks: int, microbatches: int) -> Schedule:
    """Any schedule with any sizes up to these, log-uniform: fewer microbatches than ranks are among them."""

    def size(largest: int) -> int:
        return int(math.exp(rng.uniform(0, math.log(largest + 1))))

    name = rng.choice(list(SCHEDULES))
    sizes = {"chunks": size(chunks)} if SCHEDULES[name].chunks is None else {}
    return build(name, ranks=size(ranks), microbatches=size(microbatches), **sizes)


def lower_naive(schedule: Schedule) -> Lowered:
    """Receive before each compute and send after it, both blocking: the obvious lowering, and the wrong one."""
    programs = []
    for rank, actions in enumerate(schedule.actions):
        program = []
        for action in actions:
            source, target = schedule.source(action), schedule.target(action)
            if source and schedule.placement[source[1]] != rank:
                message = (*source, action.microbatch, schedule.placement[source[1]])
                program += [Transfer(Kind.RECV_POST, *message), Transfer(Kind.RECV_WAIT, *message)]
            program.append(action)
            if target and schedule.placement[target[1]] != rank:
                message = (target[0], action.stage, action.microbatch, schedule.placement[target[1]])
                program += [Transfer(Kind.SEND_POST, *message), Transfer(Kind.SEND_WAIT, *message)]
        programs.append(tuple(program))
    return Lowered(schedule, tuple(programs))


def prove(schedule: Schedule) -> Report:
    """By both lowerings, and by counting."""
    report = validate(lower(schedule))
    assert validate(lower(schedule, group=True)) == report == validate(lower(schedule.apart()))
    passes = 2 if schedule.backward else 1
    split = sum(action.kind is Kind.W for actions in schedule.actions for action in actions)
    assert report.actions == passes * schedule.stages * schedule.microbatches + split
    borders = sum(a != b for a, b in pairwise(schedule.placement))
    assert report.messages == passes * borders * schedule.microbatches
    return report


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32))
def test_every_built_schedule_is_proved(seed):
    schedule = drawn(random.Random(seed), ranks=12, chunks=4, microbatches=24)
    prove(schedule)
    for group in (False, True):
        assert runs_right(lower(schedule, group=group))


def check_configurations(count: int, seed: int, seconds: float) -> None:
    """Sizes up to 64 ranks x 8 chunks x 256 microbatches, on all cores; `seconds` is the bar."""
    start = time.perf_counter()
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        parts = list(pool.map(_prove_some, range(seed, seed + 50), [-(-count // 50)] * 50))
    configurations = [each for part in parts for each in part]
    took = time.perf_counter() - start
    digest = hashlib.sha256(repr(configurations).encode()).hexdigest()[:16]
    actions = sum(each[-1] for each in configurations)
    print(f"\n{len(configurations)} configurations ({digest}), {actions} actions, proved in {took:.1f} s")
    assert len(configurations) >= count
    assert took < seconds


def _prove_some(seed: int, count: int) -> list[tuple]:
    gc.disable()  # millions of tuples and not one cycle
    rng, proved = random.Random(seed), []
    for i in range(count):
        schedule = drawn(rng, ranks=64, chunks=8, microbatches=256)
        report = validate(lower(schedule, group=i % 2 == 1))
        proved.append((schedule.name, schedule.ranks, schedule.stages, schedule.microbatches, report.actions))
    return proved


def test_many_configurations_are_proved():
    check_configurations(150, seed=100, seconds=60)


@pytest.mark.full
def test_five_thousand_configurations_are_proved():
    check_configurations(5_000, seed=200, seconds=120)  # the bar is 60 s; test machines are shared


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_naive_lowering_of_1f1b_deadlocks(ranks):
    waits = "; ".join(f"rank {r} waits at SEND_WAIT of F of stage {r}, .* for rank {r + 1}" for r in range(ranks - 1))
    with pytest.raises(ScheduleError, match=f"1f1b deadlocks: {waits}; rank {ranks - 1} waits at SEND_WAIT of B"):
        validate(lower_naive(build("1f1b", ranks=ranks, microbatches=2 * ranks)))


def test_naive_lowering_of_gpipe_is_slow_but_clean():
    validate(lower_naive(build("gpipe", ranks=4, microbatches=8)))


def mutants(count: int, seed: int):
    """`count` mutants, half of them of compute orders and half of transfers; what does not even lower is refused."""
    rng = random.Random(seed)
    for _ in range(count):
        schedule = drawn(rng, ranks=6, chunks=3, microbatches=8)
        lowered = lower(schedule, group=rng.random() < 0.5)
        if rng.random() < 0.5 or not any(isinstance(step, Transfer) for step in chain(*lowered.programs)):
            what, mutant = mutate_schedule(schedule, rng)
            try:
                yield what, mutant, runs_right(lower(mutant)) and within_memory(mutant)
            except (ScheduleError, IndexError, KeyError, ValueError):
                yield what, mutant, False
        else:
            what, mutant = mutate_transfers(lowered, rng)
            yield what, mutant, runs_right(mutant)


def within_memory(schedule: Schedule) -> bool:
    sizes = {
        "ranks": schedule.ranks,
        "microbatches": schedule.microbatches,
        "chunks": schedule.stages // schedule.ranks,
    }
    for rank, actions in enumerate(schedule.actions):
        live, most = 0, peak_live(schedule.name, rank, **sizes)
        for action in actions:
            live += {Kind.F: schedule.backward, Kind.BW: -1, Kind.W: -1}.get(action.kind, 0)
            if live > most:
                return False
    return True


def check_mutants(count: int, seed: int, least: int) -> None:
    caught, harmless = Counter(), Counter()
    for what, mutant, right in mutants(count, seed):
        try:
            validate(mutant)
            assert right, f"accepted a schedule that does not run right: {what} in {mutant}"
            harmless[what] += 1
        except ScheduleError as error:
            assert not right, f"refused a schedule that runs right: {what}: {error}"
            caught[what] += 1
    print(f"\ncaught {caught.total()} of {caught.total()} mutants {dict(caught)}, {harmless.total()} equivalent ones")
    assert caught.total() >= least
    assert min(caught.values()) >= 3


def test_mutants_are_caught():
    check_mutants(1_000, seed=1, least=200)


@pytest.mark.full
def test_many_mutants_are_caught():
    check_mutants(10_000, seed=2, least=2_000)


def edited(schedule: Schedule, rank: int, actions: list[Action]) -> Schedule:
    rows = list(schedule.actions)
    rows[rank] = tuple(actions)
    return Schedule(schedule.name, schedule.placement, schedule.microbatches, tuple(rows), schedule.backward)


F, B, W, BW = Kind.F, Kind.B, Kind.W, Kind.BW


@pytest.mark.parametrize(
    "actions, message",
    [
        ([(F, 1, 0), (BW, 1, 0), (F, 1, 1)], "rank 1 never computes B of stage 1, microbatch 1"),
        ([(F, 1, 0), (BW, 1, 0), (F, 1, 1), (B, 1, 1)], "rank 1 never computes W of stage 1, microbatch 1"),
        ([(F, 1, 0), (F, 1, 0)], "rank 1 computes F of stage 1, microbatch 0 a second time"),
        ([(F, 1, 0), (B, 1, 0), (BW, 1, 0)], "rank 1 computes BW of stage 1, microbatch 0 a second time"),
        ([(BW, 1, 0)], "rank 1 computes BW of stage 1, microbatch 0 before its F"),
        ([(F, 1, 0), (W, 1, 0)], "rank 1 computes W of stage 1, microbatch 0 before its B"),
        ([(F, 0, 0)], "rank 1 computes F of stage 0, microbatch 0 but rank 0 holds that stage"),
        ([(F, 1, 2)], "rank 1 computes F of stage 1, microbatch 2 outside of 2 stages and 2 microbatches"),
        ([(F, 1, 0), (F, 1, 1), (BW, 1, 1), (BW, 1, 0)], "after that of microbatch 1, but gradients must add up"),
        (
            [(F, 1, 0), (F, 1, 1), (BW, 1, 0), (BW, 1, 1)],
            "rank 1 holds 2 activations at once, more than the 1 of 2 ranks, 2 stages and 2 microbatches",
        ),
    ],
)
def test_compute_faults_are_named(actions, message):
    schedule = edited(build("1f1b", ranks=2, microbatches=2), 1, [Action(*action) for action in actions])
    with pytest.raises(ScheduleError, match=message):
        validate(schedule)


# Of two stages and two microbatches, forward only, the programs are: rank 0, F0 post F0 F1 wait F0 post F1 wait F1;
# rank 1, post F0 post F1 wait F0 F0 wait F1 F1.
@pytest.mark.parametrize(
    "rank, at, change, message",
    [
        (0, 0, None, "rank 0 computes F of stage 0, microbatch 1 where the schedule has F of stage 0, microbatch 0"),
        (0, 1, None, "rank 0 reaches SEND_WAIT of F of stage 0, microbatch 0 before it is computed or posted"),
        (0, 3, None, "the sender never reaches SEND_WAIT of F of stage 0, microbatch 0"),
        (1, 0, None, "rank 1 reaches RECV_WAIT of F of stage 0, microbatch 0 before it is computed or posted"),
        (1, 2, None, "rank 1 reaches F of stage 1, microbatch 0 before F of stage 0, microbatch 0 is there"),
        (1, 1, {"microbatch": 0}, "rank 1 reaches RECV_POST of F of stage 0, microbatch 0 a second time"),
        (1, 1, {"microbatch": 2}, "RECV_POST of F of stage 0, microbatch 2 with rank 0, but the placement has no such"),
        (1, 1, {"peer": 1}, "RECV_POST of F of stage 0, microbatch 1 with rank 1, but the placement has no such"),
        (1, 1, {"payload": "B"}, "RECV_POST of B of stage 0, microbatch 1 with rank 0, but the placement has no such"),
    ],
)
def test_transfer_faults_are_named(rank, at, change, message):
    lowered = lower(build("forward-only", ranks=2, microbatches=2))
    programs = [list(program) for program in lowered.programs]
    programs[rank][at : at + 1] = [] if change is None else [programs[rank][at]._replace(**change)]
    with pytest.raises(ScheduleError, match=message):
        validate(Lowered(lowered.schedule, tuple(map(tuple, programs))))


def test_a_send_before_its_compute_and_one_out_of_order_are_named():
    lowered = lower(build("gpipe", ranks=2, microbatches=2))
    early = list(lowered.programs[0])
    early[:2] = reversed(early[:2])
    with pytest.raises(ScheduleError, match="rank 0 reaches SEND_POST of F of stage 0, microbatch 0 before it is comp"):
        validate(Lowered(lowered.schedule, (tuple(early), lowered.programs[1])))
    crossed = list(lowered.programs[1])
    crossed[:2] = reversed(crossed[:2])
    with pytest.raises(
        ScheduleError,
        match="rank 0 sends F of stage 0, microbatch 0 where rank 1 receives F of stage 0, microbatch 1",
    ):
        validate(Lowered(lowered.schedule, (lowered.programs[0], tuple(crossed))))


def test_b_and_w_apart_are_proved_and_hold_memory_until_w():
    both = [(B, 1, 0), (B, 1, 1), (W, 1, 0), (W, 1, 1)]
    schedule = edited(build("gpipe", ranks=2, microbatches=2), 1, [Action(*a) for a in [(F, 1, 0), (F, 1, 1), *both]])
    assert validate(schedule).peak_live == (2, 2)


def test_a_circle_of_compute_orders_is_named():
    orders = [[(F, 0, 0), (BW, 0, 0), (F, 0, 1), (BW, 0, 1)], [(F, 1, 0), (F, 1, 1), (BW, 1, 0), (BW, 1, 1)]]
    actions = tuple(tuple(Action(*action) for action in order) for order in orders)
    with pytest.raises(ScheduleError, match="rank 1 waits at F of stage 1, microbatch 1 for F of stage 0 of rank 0"):
        validate(Schedule("mine", (0, 1), 2, actions))


def test_lowered_actions_must_be_those_of_the_schedule():
    lowered = lower(build("gpipe", ranks=1, microbatches=2))
    program = (lowered.programs[0][1], lowered.programs[0][0], *lowered.programs[0][2:])
    with pytest.raises(
        ScheduleError, match="computes F of stage 0, microbatch 1 where the schedule has F of stage 0, m"
    ):
        validate(Lowered(lowered.schedule, (program,)))


def test_largest_1f1b_is_proved_in_linear_time():
    def seconds(microbatches: int) -> float:
        lowered = lower(build("1f1b", ranks=64, microbatches=microbatches))
        times = []
        for _ in range(2):
            start = time.process_time()
            validate(lowered)
            times.append(time.process_time() - start)
        return min(times)

    small, large = seconds(64), seconds(256)
    print(f"\nvalidate: 64 stages x 64 microbatches {small:.3f} s, x 256 {large:.3f} s (bar 0.2 s)")
    assert large < 8 * small, "four times the steps took more than eight times the time"
    assert large < 1.0, "five times the bar, since test machines are shared"


def two_ranks(first: list[tuple], second: list[tuple], name: str = "mine") -> Schedule:
    """A V of four stages on two ranks, two microbatches."""
    return Schedule(name, (0, 1, 1, 0), 2, tuple(tuple(Action(*each) for each in order) for order in (first, second)))


V_FIRST = [(F, 0, 0), (F, 0, 1), (F, 3, 0), (BW, 3, 0), (F, 3, 1), (BW, 3, 1), (BW, 0, 0), (BW, 0, 1)]
V_SECOND = [(F, 1, 0), (F, 2, 0), (F, 1, 1), (F, 2, 1), (BW, 2, 0), (BW, 1, 0), (BW, 2, 1), (BW, 1, 1)]


def test_a_joint_step_has_its_inputs_before_it_and_sends_in_between():
    joint = [*V_SECOND[:2], (Kind.PAIR, 1, 1), (F, 1, 1), (BW, 2, 0), (F, 2, 1), *V_SECOND[5:]]
    lowered = lower(two_ranks(V_FIRST, joint))
    assert validate(lowered).messages == 8
    words = [f"{step.kind} {step.stage} {step.microbatch}" for step in lowered.programs[1]]
    at = words.index("PAIR 1 1")
    assert words[at - 2 : at + 3] == ["RECV_WAIT 0 1", "RECV_WAIT 3 0", "PAIR 1 1", "F 1 1", "BW 2 0"]


@pytest.mark.parametrize(
    "joint, message",
    [
        ([(Kind.PAIR, 1, 1), (F, 1, 1), (F, 2, 0)], "PAIR of stage 1, microbatch 1 followed by F of stage 1, micr"),
        ([(Kind.PAIR, 1, 0), (F, 1, 1), (BW, 2, 0)], "expected that F and then a B or BW"),
        ([(Kind.PAIR, 1, 1)], "followed by nothing; expected that F and then a B or BW"),
        ([(Kind.PAIR, 1, 1), (F, 1, 1), (BW, 1, 1)], "whose B needs its own F; expected two different ones"),
        ([(Kind.PAIR, 3, 0)], "PAIR of stage 3, microbatch 0 but rank 0 holds that stage"),
    ],
)
def test_faulty_joint_steps_are_named(joint, message):
    with pytest.raises(ScheduleError, match=message):
        validate(two_ranks(V_FIRST, [*V_SECOND[:2], *joint]))


def test_a_joint_step_that_waits_within_is_refused():
    joint = [*V_SECOND[:2], (Kind.PAIR, 1, 1), (F, 1, 1), (BW, 2, 0), (F, 2, 1), *V_SECOND[5:]]
    first, program = lower(two_ranks(V_FIRST, joint)).programs
    at = next(i for i, step in enumerate(program) if step.kind is Kind.PAIR)
    late = (*program[: at - 1], *program[at : at + 2], program[at - 1], *program[at + 2 :])
    with pytest.raises(ScheduleError, match="within a joint step; wait before its PAIR"):
        validate(Lowered(two_ranks(V_FIRST, joint), (first, late)))


def test_grouping_halves_the_calls_of_steady_1f1b():
    """Every post of the middle rank of three stands in a group, but for those of warm-up and drain."""
    program = lower(build("1f1b", ranks=3, microbatches=64), group=True).programs[1]
    posts = sum(step.kind in (Kind.SEND_POST, Kind.RECV_POST) for step in program)
    groups = sum(isinstance(step, Group) for step in program)
    assert posts == 4 * 64
    assert groups >= 2 * 64 - 6


@pytest.mark.parametrize("grouped", [False, True])
def test_a_group_that_couples_what_must_not_wait_for_each_other_deadlocks(grouped):
    """GPipe on two ranks: rank 1 answers microbatch 0 only after microbatch 1, which rank 0 sends after its wait."""
    schedule = build("gpipe", ranks=2, microbatches=2)

    def step(kind: Kind, payload: str, microbatch: int) -> Transfer:
        return Transfer(kind, payload, 0 if payload == "F" else 1, microbatch, 1)

    first = (
        *(Action(F, 0, 0), Group(Kind.GROUP, 2), step(Kind.SEND_POST, "F", 0), step(Kind.RECV_POST, "B", 0)),
        *(step(Kind.SEND_WAIT, "F", 0), Action(F, 0, 1), step(Kind.SEND_POST, "F", 1), step(Kind.RECV_POST, "B", 1)),
        *(step(Kind.RECV_WAIT, "B", 0), Action(BW, 0, 0), step(Kind.RECV_WAIT, "B", 1), Action(BW, 0, 1)),
        step(Kind.SEND_WAIT, "F", 1),
    )
    second = lower(schedule).programs[1]
    if not grouped:
        alone = tuple(each for each in first if not isinstance(each, Group))
        assert validate(Lowered(schedule, (alone, second))).messages == 4
        return
    assert not runs_right(Lowered(schedule, (first, second)))
    with pytest.raises(ScheduleError, match="gpipe deadlocks: rank 0 waits at SEND_WAIT of F of stage 0, microbatch 0"):
        validate(Lowered(schedule, (first, second)))


def test_groups_of_something_else_are_refused():
    lowered = lower(build("1f1b", ranks=2, microbatches=2))
    first, second = lowered.programs
    with pytest.raises(ScheduleError, match="reaches GROUP of 5 posts with 2 posts of this rank behind it"):
        validate(Lowered(lowered.schedule, (first, (Group(Kind.GROUP, 5), *second))))


def test_tensor_parallel_ranks_must_run_the_same_steps():
    schedule = build("1f1b", ranks=2, microbatches=3)
    assert validate(lower(schedule), tensor_parallel=[lower(schedule)] * 3)
    with pytest.raises(
        ScheduleError, match=r"tensor-parallel ranks of rank 0 differ: .* their collectives would not meet"
    ):
        validate(lower(schedule), tensor_parallel=[lower(schedule), lower(build("gpipe", ranks=2, microbatches=3))])


@pytest.mark.full
@pytest.mark.parametrize("name, sizes", [("interleaved-1f1b", {"chunks": 8}), ("zb-v", {})])
def test_the_largest_cases_take_seconds(name, sizes):
    """64 ranks and 256 microbatches, built, proved and simulated; the bar is 5 s."""
    costs = Costs(F=100, B=120, W=80)
    start = time.process_time()
    lowered = lower(build(name, ranks=64, microbatches=256, costs=costs, **sizes))
    report = validate(lowered)
    simulation = simulate(lowered, costs)
    took = time.process_time() - start
    print(f"\n{name}: {report.actions} actions, makespan {simulation.makespan:.0f}, in {took:.2f} s (bar 5 s)")
    assert took < 15, "three times the bar, since test machines are shared"
