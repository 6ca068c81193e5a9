"""The V schedules whose W are placed greedily: orders, bubbles and memory against what is published, speed."""

import gc
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpmp_kernels.pipeline.costs import Costs
from tpmp_kernels.pipeline.schedule import Kind, Schedule
from tpmp_kernels.pipeline.schedules import SCHEDULES, build, peak_live, zb_v
from tpmp_kernels.pipeline.schedules.greedy import Way, place
from tpmp_kernels.pipeline.schedules.placement import folded
from tpmp_kernels.pipeline.schedules.v_pattern import PERIOD, forwards_and_backwards
from tpmp_kernels.pipeline.simulate import simulate

EQUAL = Costs(F=2, B=2, W=2)
NAMES = ("zb-v", "v-half", "v-min")
PUBLISHED = [  # (B, W) for F = 100, and the idle time of the published 1.6-3.2, 0.3-0.6 and 4-8 % at 4 ranks
    (120, 80, 80),
    (90, 110, 15),
    (140, 60, 210),
]


def carried_out(schedule: Schedule, costs: Costs | None = None) -> tuple[list[int], list[float]]:
    """The most live activations of each rank, and how long it idles between its first start and its last end, where an
    action starts as soon as its rank is free and its input is there. Checks that all is complete and no rank stuck."""
    stages, ranks, costs = schedule.stages, schedule.ranks, costs or Costs()
    times = costs.times(stages, ranks)
    ends, clock, position = {}, [None] * ranks, [0] * ranks
    live, most, idle = [0] * ranks, [0] * ranks, [0] * ranks
    while moved := [rank for rank in range(ranks) if position[rank] < len(schedule.actions[rank])]:
        before = len(ends)
        for rank in moved:
            for kind, stage, i in schedule.actions[rank][position[rank] :]:
                assert schedule.placement[stage] == rank and (kind, stage, i) not in ends
                assert i == 0 or (kind, stage, i - 1) in ends, "microbatches in increasing order"
                if kind is Kind.W:
                    needs = [(Kind.B, stage, i)]
                elif kind is Kind.B:
                    needs = [(Kind.F, stage, i), (Kind.B, stage + 1, i)][: 2 if stage < stages - 1 else 1]
                else:
                    needs = [(Kind.F, stage - 1, i)] if stage else []
                if not all(need in ends for need in needs):
                    break
                arrives = [ends[a] + (costs.transfer if schedule.placement[a[1]] != rank else 0) for a in needs]
                now = clock[rank] if clock[rank] is not None else max(arrives, default=0)
                start = max([now, *arrives])
                idle[rank] += start - now
                ends[kind, stage, i] = clock[rank] = start + times[kind][stage]
                position[rank] += 1
                live[rank] += {Kind.F: 1, Kind.B: 0, Kind.W: -1}[kind]
                most[rank] = max(most[rank], live[rank])
        assert len(ends) > before, "deadlock"
    assert len(ends) == 3 * stages * schedule.microbatches
    return most, idle


@pytest.mark.parametrize("name", NAMES)
def test_small_shapes_without_exception(name):
    for ranks in range(1, 9):
        for microbatches in range(1, 21):
            most, _ = carried_out(build(name, ranks=ranks, microbatches=microbatches))
            bounds = [SCHEDULES[name].peak_live(rank, ranks, microbatches) for rank in range(ranks)]
            assert all(live <= bound for live, bound in zip(most, bounds, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_every_number_of_ranks_is_within_its_memory(name):
    for ranks in (*range(1, 17), 24, 31, 32, 48, 64):
        sizes = {"ranks": ranks, "microbatches": 9 if ranks % 16 else 24}
        most, _ = carried_out(build(name, **sizes))
        assert all(live <= peak_live(name, rank, **sizes, chunks=2) for rank, live in enumerate(most))


times = st.integers(0, 9)


@settings(deadline=None, max_examples=40)
@given(st.data(), st.integers(1, 24), st.integers(1, 64), st.tuples(times, times, times), st.integers(0, 5))
def test_any_costs_and_limits_give_a_schedule_within_the_limit(data, ranks, microbatches, each, latency):
    limit = data.draw(st.integers(2, 2 * ranks))
    costs = Costs(*each, latency=latency)
    schedule = zb_v.build(ranks, microbatches, costs, limit=limit)
    assert max(carried_out(schedule)[0]) <= limit
    assert zb_v.build(ranks, microbatches, costs, limit=limit) == schedule


@settings(deadline=None, max_examples=40)
@given(st.data(), st.integers(1, 6), st.integers(1, 12), st.integers(0, 5))
def test_bubbles_are_as_placed_and_never_below_the_least(data, ranks, microbatches, latency):
    by_stage = st.lists(times, min_size=2 * ranks, max_size=2 * ranks)
    costs = Costs(*(data.draw(by_stage) for _ in "FBW"), latency=latency)
    limit, way = data.draw(st.integers(2, 2 * ranks)), Way(ranks, microbatches, costs)
    orders = zb_v._orders(ranks, microbatches, limit)
    for rule in zb_v._RULES:
        placed = place(way, orders, limit, rule)
        schedule = Schedule("placed", folded(ranks), microbatches, way.actions(placed.orders))
        _, idle = carried_out(schedule, costs)
        assert max(idle) == placed.bubble >= zb_v._least(way, limit)
        assert simulate(schedule, costs).makespan >= placed.end


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 6, 7, 8, 16])
@pytest.mark.parametrize("more", [0, 1, 7])
def test_zb_v_has_no_bubble_at_equal_times(ranks, more):
    simulation = simulate(build("zb-v", ranks=ranks, microbatches=2 * ranks + more, costs=EQUAL), EQUAL)
    assert simulation.span_bubble == 0
    assert max(simulation.peak_memory) <= ranks


@pytest.mark.parametrize("b, w, idle", PUBLISHED)
def test_zb_v_leaves_the_bubble_that_is_published_for_four_ranks(b, w, idle):
    """Where B > F nothing below is possible."""
    costs = Costs(F=100, B=b, W=w)
    for microbatches in (8, 16, 32):
        simulation = simulate(build("zb-v", ranks=4, microbatches=microbatches, costs=costs), costs)
        plain = simulate(build("1f1b", ranks=4, microbatches=microbatches), costs)
        print(f"\n{b}/{w}, m = {microbatches}: {simulation.span_bubble / simulation.span:.2%}", end="")
        print(f" of the span, 1F1B {plain.bubble_ratio:.1%}", end="")
        assert simulation.span_bubble == idle
        assert b < 100 or zb_v._least(Way(4, microbatches, costs), 8) == idle


@pytest.mark.parametrize(
    "ranks, b, w, idle", [(8, 120, 80, 250), (8, 90, 110, 35), (8, 140, 60, 530), (8, 120, 100, 130), (4, 110, 90, 45)]
)
def test_zb_v_does_not_fall_back(ranks, b, w, idle):
    """Nothing is published here; the third is the least possible."""
    costs = Costs(F=100, B=b, W=w)
    for microbatches in (2 * ranks, 4 * ranks, 8 * ranks):
        simulation = simulate(build("zb-v", ranks=ranks, microbatches=microbatches, costs=costs), costs)
        assert simulation.span_bubble <= idle


@pytest.mark.parametrize("ranks", [4, 8, 16])
@pytest.mark.parametrize("name, published", [("v-half", 1 / 2), ("v-min", 2 / 3)])
def test_less_memory_costs_no_more_bubble_than_published(name, published, ranks):
    """Relative to the ideal time of m microbatches the papers give p / (2 m) and 2 p / (3 m)."""
    for microbatches in (2 * ranks, 6 * ranks):
        simulation = simulate(build(name, ranks=ranks, microbatches=microbatches), EQUAL)
        ideal = microbatches * (EQUAL.F + EQUAL.B + EQUAL.W)
        assert simulation.bubble / ideal <= published * ranks / microbatches
        assert max(simulation.peak_memory) <= {"v-half": (ranks + 2) // 2, "v-min": (ranks + 4) // 3}[name]


def test_less_memory_never_means_less_bubble_than_more():
    """From the memory of V-Min over that of V-Half to that of 1F1B, at equal times."""
    limits = (2 * (12 // 3), 2 * (10 // 2), 16)
    bubbles = [simulate(zb_v.build(8, 24, EQUAL, limit=limit), EQUAL).span_bubble for limit in limits]
    assert bubbles == sorted(bubbles, reverse=True)
    assert bubbles[1] <= simulate(build("v-half", ranks=8, microbatches=24), EQUAL).span_bubble


def test_measured_times_are_looked_at():
    """The order that is best for equal times is not the best for others."""
    costs = Costs(F=100, B=120, W=80)
    fed, unfed = (build("zb-v", ranks=4, microbatches=8, costs=each) for each in (costs, None))
    assert simulate(fed, costs).span_bubble < simulate(unfed, costs).span_bubble


@pytest.mark.parametrize("limit", [-1, 0, 1, 9])
def test_limits_out_of_reach_are_refused(limit):
    with pytest.raises(ValueError, match=f"zb-v: limit is {limit}; expected 2 to 8 live chunk activations on 4 ranks"):
        zb_v.build(4, 8, Costs(), limit=limit)


@pytest.mark.parametrize("slopes, period", [((2, 1, 2, 1), PERIOD), ((1, 1, 1, 1), PERIOD), ((1, 1, 1, 1), 14)])
@pytest.mark.parametrize("ranks", range(1, 25))
def test_passes_of_the_pattern_follow_their_inputs(ranks, slopes, period):
    m = 2 * PERIOD
    for rank, order in enumerate(forwards_and_backwards(ranks, m, slopes, period)):
        assert len(set(order)) == len(order) == 4 * m
        where = {each: at for at, each in enumerate(order)}
        for i in range(m):
            legs = (rank, 2 * ranks - 1 - rank, 2 * ranks + rank, 4 * ranks - 1 - rank)
            passes = [leg * m + i for leg in legs]
            assert sorted(passes, key=where.get) == passes


@pytest.mark.parametrize("slopes", [(1, 4, 1, 4), (3, 4, 3, 4)])
def test_slopes_that_always_meet_are_refused(slopes):
    with pytest.raises(AssertionError, match="meet on some rank whatever the turns, in a period of 6"):
        forwards_and_backwards(8, 4, slopes)


@pytest.fixture
def nothing_else_to_collect():
    """The garbage collector goes through what a test makes, not through what thousands of others left alive."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def test_the_largest_is_built_in_time(nothing_else_to_collect):
    for name, costs, bar in (("zb-v", EQUAL, 2), ("zb-v", Costs(F=100, B=120, W=80), 2), ("v-half", None, 0.1)):
        start = time.process_time()
        schedule = build(name, ranks=64, microbatches=256, costs=costs)
        took = time.process_time() - start
        print(f"\n{name} at 64 ranks x 256 microbatches, {costs}: built in {took:.2f} s (bar {bar} s)")
        assert sum(map(len, schedule.actions)) == 6 * 64 * 256
        assert took < 5 * bar
