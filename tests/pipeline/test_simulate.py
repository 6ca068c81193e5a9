"""The simulator: agrees with two independent oracles, meets the published formulas exactly, and is fast enough."""

import math
import random
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpmp_kernels.errors import ScheduleError
from tpmp_kernels.pipeline.costs import Costs
from tpmp_kernels.pipeline.lowering import Lowered, lower
from tpmp_kernels.pipeline.schedule import Action, Event, Group, Kind, Schedule, Transfer
from tpmp_kernels.pipeline.schedules import build
from tpmp_kernels.pipeline.simulate import simulate

F, B, W, BW, PAIR = Kind.F, Kind.B, Kind.W, Kind.BW, Kind.PAIR


def random_schedule(rng: random.Random) -> Schedule:
    """Any placement, and any order that can run: an execution is drawn, and each rank's part of it is its order."""
    ranks, microbatches = rng.randint(1, 4), rng.randint(1, 5)
    placement = tuple(rng.randrange(ranks) for _ in range(rng.randint(1, 6)))
    stages, split, done = len(placement), rng.random() < 0.5, set()
    orders: list[list[Action]] = [[] for _ in range(ranks)]
    todo = [
        (kind, s, i) for kind in ((F, B, W) if split else (F, BW)) for s in range(stages) for i in range(microbatches)
    ]

    def needs(kind: Kind, stage: int, i: int) -> set:
        if kind is F:
            return {("F", stage - 1, i)} if stage else set()
        if kind is W:
            return {("B", stage, i)}
        return {("F", stage, i)} | ({("B", stage + 1, i)} if stage < stages - 1 else set())

    while todo:
        ready = [each for each in todo if needs(*each) <= done]
        first = rng.choice(ready)
        here = [each for each in ready if placement[each[1]] == placement[first[1]] and each[0] in (B, BW)]
        step = [first, rng.choice(here)] if first[0] is F and here and rng.random() < 0.5 else [first]
        if len(step) == 2:
            orders[placement[first[1]]].append(Action(PAIR, *first[1:]))
        for kind, stage, i in step:
            todo.remove((kind, stage, i))
            done.add((kind[0], stage, i))
            orders[placement[stage]].append(Action(kind, stage, i))
    return Schedule("random", placement, microbatches, tuple(map(tuple, orders)))


def random_costs(rng: random.Random, stages: int, **transfer: int) -> Costs:
    """Whole numbers for each stage and kind, so that all times are exact."""
    times = {name: [rng.randint(0, 9) for _ in range(stages)] for name in ("F", "B", "W", "BW")}
    return Costs(**times, pair=rng.choice([1, 1, 2]), early_release=rng.random() < 0.5, **transfer)


def units(schedule: Schedule, costs: Costs, rank: int) -> list[tuple]:
    """What the rank computes as one: (needs, [(offset of the start, duration)], [(gives, offset)], length)."""
    result, actions = [], [tuple(action) for action in schedule.actions[rank]]
    while actions:
        joint = actions[0][0] == "PAIR"
        unit, actions = (actions[1:3], actions[3:]) if joint else (actions[:1], actions[1:])
        needs, parts, gives, length = [], [], [], 0
        for kind, stage, i in unit:
            took = getattr(costs, kind)[stage] * (costs.pair if joint else 1)
            parts.append((length, took))
            length += took
            if kind != "W":
                needs.append(("F", stage - 1, i) if kind == "F" else ("B", stage + 1, i))
                gives.append(("F" if kind == "F" else "B", stage, i, length))
        if joint:
            parts.insert(0, (0, length))
        gives = [(each[:3], each[3] if costs.early_release else length) for each in gives]
        result.append((needs, parts, gives, length))
    return result


def longest_paths(schedule: Schedule, costs: Costs) -> list[list[tuple[int, int]]]:
    """(start, end) of each action by the computes alone: all start at 0 and go up until each is after its inputs."""
    ranks = [units(schedule, costs, rank) for rank in range(schedule.ranks)]
    there, before = {}, None
    while before != there:
        before, times = dict(there), []
        for each in ranks:
            clock = 0
            times.append([])
            for needs, parts, gives, length in each:
                clock = max([clock, *(there.get(key, 0) for key in needs)])
                times[-1] += [(clock + offset, clock + offset + took) for offset, took in parts]
                there.update({key: clock + offset for key, offset in gives})
                clock += length
    return times


def step_by_step(lowered: Lowered, costs: Costs) -> tuple[list[list[tuple[int, int]]], list[int]]:
    """(start, end) of each action, and what each rank waits for transfers under way, with messages by name. Every time
    starts at 0 and goes up until all rules hold."""
    posts, arrival, before = {}, {}, None
    order = {}
    for rank, program in enumerate(lowered.programs):
        for kind, payload, stage, i, peer in (step for step in program if type(step) is Transfer):
            if kind == "SEND_POST":
                order.setdefault((rank, peer), []).append((payload, stage, i))
    while before != (posts, arrival):
        before = (dict(posts), dict(arrival))
        walks = [
            _walk(rank, program, lowered.schedule, costs, posts, arrival)
            for rank, program in enumerate(lowered.programs)
        ]
        for names in order.values():
            free = 0
            for name in names:
                start = max(posts["SEND", name], posts["RECV", name], free)
                free = start + costs.message // costs.bandwidth
                arrival[name] = free + costs.latency
    return [times for times, _ in walks], [exposed for _, exposed in walks]


def _walk(rank, program, schedule, costs, posts, arrival):
    """One rank by what is known of the others; notes its posts. A group is complete when all of its messages are."""
    parts = iter([part for _, parts, _, _ in units(schedule, costs, rank) for part in parts])
    clock, times, exposed, joint_end, together = 0, [], 0, 0, {}
    for at, step in enumerate(program):
        if type(step) is Action:
            _, took = next(parts)
            times.append((clock, clock + took))
            if step.kind == "PAIR":
                joint_end = clock + took
            else:
                clock += took
        elif type(step) is Group:
            group = [each[1:4] for each in program[at + 1 : at + 1 + step.posts]]
            together.update(dict.fromkeys(group, group))
        else:
            name, (end, what) = step[1:4], step.kind.split("_")
            if what == "POST":
                posts[end, name] = clock if costs.early_release else max(clock, joint_end)
                continue
            arrived = max(arrival.get(each, 0) for each in together.get(name, [name]))
            if arrived > clock:
                exposed += arrived - min(arrived, max(clock, posts["SEND", name], posts["RECV", name]))
                clock = arrived
    return times, exposed


def times_of(simulation) -> list[list[tuple[int, int]]]:
    return [list(zip(*each, strict=True)) for each in zip(simulation.starts, simulation.ends, strict=True)]


def without_send_waits(lowered: Lowered) -> Lowered:
    """Buffers without limit: a send is waited for at the very end only, and every receive is posted at the start."""
    programs = []
    for program in lowered.programs:
        rank = {Kind.RECV_POST: 0, Kind.SEND_WAIT: 2}
        programs.append(tuple(sorted(program, key=lambda step: rank.get(step.kind, 1))))
    return Lowered(lowered.schedule, tuple(programs))


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 2**32))
def test_times_are_longest_paths_where_buffers_are_free(seed):
    rng = random.Random(seed)
    schedule = random_schedule(rng)
    costs = random_costs(rng, schedule.stages)
    simulation = simulate(without_send_waits(lower(schedule)), costs)
    assert times_of(simulation) == longest_paths(schedule, costs)
    assert not any(simulation.exposed)


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 2**32))
def test_times_are_those_of_the_steps(seed):
    rng = random.Random(seed)
    schedule = random_schedule(rng)
    costs = random_costs(rng, schedule.stages, latency=rng.randint(0, 5), message=rng.randint(0, 5), bandwidth=1)
    for group in (False, True):
        lowered = lower(schedule, group=group)
        simulation = simulate(lowered, costs)
        times, exposed = step_by_step(lowered, costs)
        assert times_of(simulation) == times
        assert group or list(simulation.exposed) == exposed
        assert simulation.makespan == max(end for each in times for _, end in each)


def test_whole_and_rational_times_stay_what_they_are():
    schedule = build("forward-only", ranks=3, microbatches=4)
    simulation = simulate(schedule, Costs(F=[Fraction(1, 3)] * 3, latency=Fraction(1, 7)))
    assert type(simulation.makespan) is Fraction
    assert simulation.makespan == (4 + 3 - 1) * Fraction(1, 3) + (3 - 1) * Fraction(1, 7)
    whole = simulate(build("1f1b", ranks=3, microbatches=4), Costs(F=[1] * 3, B=[1] * 3, W=[1] * 3))
    assert type(whole.makespan) is int


# The published formulas, as functions of ranks p, microbatches m and the times of one microbatch on one rank; all
# times below are such that every sum is exact, so they are met with ==.

SIZES = [(p, m) for p in (4, 8) for m in (2 * p, 4 * p)]
EQUAL, UNEQUAL = (1, 1, 1), (4, 5, 2)


@pytest.mark.parametrize("p, m", SIZES)
@pytest.mark.parametrize("f, b, w", [EQUAL, UNEQUAL])
def test_gpipe_and_1f1b_meet_their_formulas(p, m, f, b, w):
    for name in ("gpipe", "1f1b"):
        simulation = simulate(build(name, ranks=p, microbatches=m), Costs(f, b, w))
        assert simulation.bubble == simulation.span_bubble == (p - 1) * (f + b + w)
        assert simulation.makespan == simulation.span == (m + p - 1) * (f + b + w)
        assert simulation.bubble_ratio == (p - 1) / (m + p - 1)
        assert simulation.busy == (m * (f + b + w),) * p
        assert simulation.messages == 2 * (p - 1) * m
    assert simulation.peak_memory == tuple(min(m, p - rank) for rank in range(p))
    assert simulate(build("gpipe", ranks=p, microbatches=m)).peak_memory == (m,) * p


@pytest.mark.parametrize("p, m", SIZES)
@pytest.mark.parametrize("v", [2, 4])
@pytest.mark.parametrize("f, b, w", [EQUAL, UNEQUAL])
def test_interleaved_1f1b_meets_its_formulas(p, m, v, f, b, w):
    schedule = build("interleaved-1f1b", ranks=p, microbatches=m, chunks=v)
    simulation = simulate(schedule, Costs(f, b, w, activation=3))
    assert simulation.bubble == (p - 1) * (f + b + w) / v
    assert simulation.peak_memory[0] == p * 3 * (1 + (p - 1) / (p * v)) == max(simulation.peak_memory)
    assert simulation.messages == 2 * (p * v - 1) * m


@pytest.mark.parametrize("p, m", SIZES)
@pytest.mark.parametrize("f, b, w", [EQUAL, UNEQUAL, (4, 5, 4), (3, 4, 5), (2, 7, 4)])
def test_zero_bubble_schedules_of_one_chunk_meet_their_formulas(p, m, f, b, w):
    """The paper gives F + B - W and F + B - 2W, for times that are about equal; the rest is what the orders' own
    critical paths add where W or B is longer than F."""
    h1, h2 = (simulate(build(name, ranks=p, microbatches=m), Costs(f, b, w)) for name in ("zb-h1", "zb-h2"))
    assert h1.bubble == (p - 1) * max(f + b - w, b)
    assert h1.peak_memory == (p,) * p
    assert h2.span_bubble == (p - 1) * max(f + b - 2 * w, b - f, 0)
    assert max(h2.peak_memory) == 2 * p - 1


@pytest.mark.parametrize("p, m", SIZES)
def test_zb_v_has_no_bubble_where_all_times_are_equal(p, m):
    simulation = simulate(build("zb-v", ranks=p, microbatches=m))
    assert simulation.span_bubble == 0
    assert simulation.peak_memory == (p,) * p


@pytest.mark.parametrize(
    "b, w, idle, published", [(120, 80, 80, (3.2, 1.6)), (90, 110, 15, (0.6, 0.3)), (140, 60, 210, (8, 4))]
)
def test_zb_v_has_the_published_bubble_for_unequal_times(b, w, idle, published):
    """F = 100, 4 ranks, 8 and 16 microbatches, in percent of the step; 1F1B has 27 and 16. The authors count the time
    that a rank idles from its first F on."""
    costs = Costs(100, b, w)
    for at, m in enumerate((8, 16)):
        simulation = simulate(build("zb-v", ranks=4, microbatches=m, costs=costs), costs)
        assert simulation.span_bubble <= idle
        assert max(simulation.peak_memory) <= 4
        share = 100 * simulation.span_bubble / simulation.span
        assert round(share, 0 if b == 140 else 1) <= published[at]
        plain = simulate(build("1f1b", ranks=4, microbatches=m), costs)
        assert round(100 * plain.bubble_ratio) == (27, 16)[at]


@pytest.mark.parametrize("p, m", SIZES)
def test_memory_of_v_half_and_v_min(p, m):
    for name, held, bubble in (("v-half", (p + 2) // 2, p / (2 * m)), ("v-min", (p + 4) // 3, 2 * p / (3 * m))):
        simulation = simulate(build(name, ranks=p, microbatches=m))
        assert max(simulation.peak_memory) <= held
        assert simulation.bubble / simulation.busy[0] <= bubble


@pytest.mark.parametrize("d, m", SIZES)
def test_dualpipe_v_meets_its_formula_and_half_of_it_where_outputs_leave_early(d, m):
    """Times and activations of one chunk, all 1. The published joint step waits for both inputs and gives at its end.
    Where it hides nothing, an F whose input is there and whose output leaves at once halves the bubble."""
    each = [1] * 2 * d
    chunk = {"F": each, "B": each, "W": each, "activation": each}
    schedule = build("dualpipe-v", ranks=d, microbatches=m)
    late, early = (simulate(schedule, Costs(**chunk, early_release=early)) for early in (False, True))
    f_and_b, full = 1 + 1 + 1, 1 + 1
    assert late.bubble == (d - 1) * (f_and_b + full - 3 * 1)
    assert early.bubble == late.bubble / 2 == (d - 1) * (1 + 1 - 1)
    assert late.peak_memory == early.peak_memory == (2 * d + 1,) * d
    assert early.schedule == schedule.apart()
    hiding = simulate(schedule, Costs(**chunk, pair=0.5))
    assert hiding.schedule == schedule and hiding.makespan < early.makespan


@pytest.mark.parametrize("p, m", SIZES)
@pytest.mark.parametrize("t", [0.125, 0.25, 1])
def test_1f1b_exposes_every_transfer_and_its_eager_form_only_those_of_fill_and_drain(p, m, t):
    def exposed(name: str, microbatches: int) -> float:
        return sum(simulate(build(name, ranks=p, microbatches=microbatches), Costs(latency=t)).exposed)

    plain, eager = (simulate(build(name, ranks=p, microbatches=m), Costs(latency=t)) for name in ("1f1b", "1f1b-eager"))
    assert eager.makespan == (m + p - 1) * 3 + 2 * (p - 1) * t < plain.makespan
    assert exposed("1f1b", 2 * m) - exposed("1f1b", m) == (p - 1) * m * t
    assert exposed("1f1b-eager", 2 * m) == exposed("1f1b-eager", m)


def forwards(ranks: int, microbatches: int) -> Lowered:
    return lower(build("forward-only", ranks=ranks, microbatches=microbatches))


def test_a_link_takes_one_message_at_a_time_and_latency_comes_on_top():
    """F ends at 1, 2, 3; the link takes 3 for each, so the messages start at 1, 4, 7 and arrive 5 after that."""
    costs = Costs(message=6, bandwidth=2, latency=2)
    simulation = simulate(without_send_waits(forwards(2, 3)), costs)
    assert simulation.starts[1] == [6, 9, 12]
    assert simulation.blocked[1] == [(1, 6), (7, 9), (10, 12)]
    assert simulation.exposed[1] == 9
    assert simulate(without_send_waits(forwards(2, 3)), Costs(latency=5)).starts[1] == [6, 7, 8]


def test_the_two_directions_between_two_ranks_are_two_links():
    """Each of two ranks forwards one microbatch for the other at the same time, over stages on ranks 0, 1 and 1, 0."""
    schedule = Schedule(
        "crossing",
        (0, 1, 0),
        2,
        tuple(
            tuple(Action(F, *each) for each in order) for order in ([(0, 0), (0, 1), (2, 0), (2, 1)], [(1, 0), (1, 1)])
        ),
        backward=False,
    )
    simulation = simulate(without_send_waits(lower(schedule)), Costs(F=[4, 2, 1], message=4, bandwidth=1))
    assert (simulation.starts, simulation.makespan) == (([0, 4, 14, 18], [8, 12]), 19)


def test_a_sender_waits_for_the_receive_and_that_is_bubble():
    """Rank 1 is slow: it posts its third receive at 10, when its first F ends, and rank 0 waits for that with its
    third message before it posts its fourth."""
    simulation = simulate(forwards(2, 4), Costs(F=[1, 9]))
    assert simulation.starts == ([0, 1, 2, 3], [1, 10, 19, 28])
    slow = simulate(forwards(2, 5), Costs(F=[1, 9], latency=1))
    assert slow.starts[0] == [0, 1, 2, 3, 12]
    assert slow.blocked[0] == [(11, 12), (20, 21), (29, 30)]


def test_parts_of_a_joint_step_follow_one_another_and_its_output_leaves_early_or_late():
    """Rank 0 runs F of stage 0 jointly with BW of stage 3; rank 1 is waiting for that F's output. A V."""
    first = [(F, 0, 0), (F, 3, 0), (PAIR, 0, 1), (F, 0, 1), (BW, 3, 0), (F, 3, 1), (BW, 3, 1), (BW, 0, 0), (BW, 0, 1)]
    second = [(F, 1, 0), (F, 2, 0), (F, 1, 1), (F, 2, 1), (BW, 2, 0), (BW, 1, 0), (BW, 2, 1), (BW, 1, 1)]
    actions = tuple(tuple(Action(*action) for action in order) for order in (first, second))
    schedule = Schedule("v", (0, 1, 1, 0), 2, actions)
    costs = {"F": [2] * 4, "BW": [4] * 4, "pair": 0.5}
    early = simulate(schedule, Costs(**costs))
    assert list(zip(early.starts[0], early.ends[0], strict=True))[:5] == [(0, 2), (6, 8), (8, 11), (8, 9), (9, 11)]
    assert early.starts[1][2] == 9
    assert early.busy[0] == 2 * 3 + 4 * 3 + 0.5 * (2 + 4)
    late = simulate(schedule, Costs(**costs, early_release=False))
    assert late.starts[0][:5] == early.starts[0][:5]
    assert late.starts[1][2] == 11
    assert [event[:3] for event in late.events()[0] if event.kind != "comm"] == [a for a in first if a[0] != PAIR]
    assert late.messages == 8
    assert type(simulate(schedule, Costs(F=[2] * 4, BW=[4] * 4)).makespan) is int


def test_memory_is_a_step_curve():
    two = simulate(build("1f1b", ranks=2, microbatches=2), Costs(activation=3))
    assert two.memory(0) == [(0, 3), (1, 6), (6, 3), (9, 0)]
    assert two.memory(1) == [(1, 3), (4, 0), (4, 3), (7, 0)]
    both = [(F, 0, 0), (F, 0, 1), (B, 0, 0), (B, 0, 1), (W, 0, 0), (W, 0, 1)]
    schedule = Schedule("split", (0,), 2, (tuple(Action(*action) for action in both),))
    assert simulate(schedule, Costs(activation=4, kept=0.25)).memory(0) == [
        *((0, 4), (1, 8), (3, 5), (4, 2), (5, 1), (6, 0))
    ]
    forward = simulate(forwards(1, 2), Costs(activation=[7]))
    assert (forward.memory(0), forward.peak_memory) == ([(0, 7), (1, 0), (1, 7), (2, 0)], (7,))


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32), st.sampled_from([0, 0.25, 1]))
def test_the_curve_has_the_peak_and_ends_at_nothing(seed, kept):
    rng = random.Random(seed)
    schedule = random_schedule(rng)
    simulation = simulate(schedule, Costs(activation=[rng.randint(0, 9) for _ in schedule.placement], kept=kept))
    for rank, peak in enumerate(simulation.peak_memory):
        curve = simulation.memory(rank)
        assert curve == sorted(curve, key=lambda point: point[0])
        assert max((level for _, level in curve), default=0) == peak
        assert not curve or curve[-1][1] == 0


def test_events_are_the_computes_and_the_exposed_transfers():
    events = simulate(build("1f1b", ranks=2, microbatches=1), Costs(latency=0.5)).events()
    up, down = Event("comm", None, None, 1, 1.5), Event("comm", None, None, 4.5, 5)
    assert events == [
        [Event("F", 0, 0, 0, 1), down, Event("BW", 0, 0, 5, 7)],
        [up, Event("F", 1, 0, 1.5, 2.5), Event("BW", 1, 0, 2.5, 4.5), down],
    ]


def test_span_is_of_the_longest_rank_and_bubble_a_mean():
    simulation = simulate(forwards(2, 1), Costs(F=[1, 3]))
    assert (simulation.makespan, simulation.span, simulation.messages) == (4, 3, 1)
    assert (simulation.bubble, simulation.bubble_ratio, simulation.span_bubble) == (2, 0.5, 0)


def test_a_schedule_without_work_has_no_bubble():
    simulation = simulate(build("gpipe", ranks=2, microbatches=1), Costs(0, 0, 0))
    assert (simulation.makespan, simulation.bubble, simulation.bubble_ratio, simulation.span) == (0, 0, 0, 0)


def test_a_program_that_does_not_finish_is_named():
    lowered = forwards(2, 2)
    program = tuple(step for step in lowered.programs[0] if (step.kind, step.microbatch) != (Kind.SEND_POST, 1))
    with pytest.raises(
        ScheduleError,
        match="forward-only: rank 0 waits at SEND_WAIT of F of stage 0, microbatch 1 for a post that never comes",
    ):
        simulate(Lowered(lowered.schedule, (program, lowered.programs[1])))
    with pytest.raises(
        ScheduleError, match="rank 1 waits at RECV_WAIT of F of stage 0, microbatch 0 for a post that n"
    ):
        simulate(Lowered(lowered.schedule, ((), lowered.programs[1])))


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"F": -1}, "costs: F is -1; expected a finite number of at least 0"),
        ({"B": math.nan}, "costs: B is nan; expected a finite number of at least 0"),
        ({"W": [1, 2, math.inf]}, "costs: W is inf; expected a finite number of at least 0"),
        ({"BW": [1, -2]}, "costs: BW is -2; expected a finite number of at least 0"),
        ({"activation": -0.5}, "costs: activation is -0.5; expected a finite number of at least 0"),
        ({"latency": -1}, "costs: latency is -1; expected a finite number of at least 0"),
        ({"message": math.inf}, "costs: message is inf; expected a finite number of at least 0"),
        ({"bandwidth": 0}, "costs: bandwidth is 0; expected more than 0"),
        ({"bandwidth": math.nan}, "costs: bandwidth is nan; expected more than 0"),
        ({"pair": 0}, "costs: pair is 0; expected a finite number above 0"),
        ({"pair": math.nan}, "costs: pair is nan; expected a finite number above 0"),
        ({"kept": 1.5}, "costs: kept is 1.5; expected a share from 0 to 1"),
        ({"kept": -0.1}, "costs: kept is -0.1; expected a share from 0 to 1"),
    ],
)
def test_costs_that_cannot_be_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        Costs(**bad)


def test_costs_by_stage_must_fit_the_stages():
    with pytest.raises(ValueError, match="costs: B has 2 numbers; expected one for each of 3 stages"):
        simulate(build("gpipe", ranks=3, microbatches=1), Costs(B=[1, 2]))


@pytest.mark.parametrize("scale", [4, pytest.param(1, marks=pytest.mark.full)])
def test_the_largest_interleaved_schedule_takes_a_second(scale):
    lowered = lower(build("interleaved-1f1b", ranks=64, microbatches=256 // scale, chunks=8))
    start = time.process_time()
    simulation = simulate(lowered)
    took = time.process_time() - start
    print(f"\nsimulate: {sum(map(len, simulation.starts))} computes, {simulation.messages} messages in {took:.2f} s")
    assert simulation.bubble == 63 * 3 / 8
    assert took < 5 / scale, "five times the bar of one second, since test machines are shared"
