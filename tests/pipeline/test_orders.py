"""The schedules that are written down as orders: their figures, torch's own orders, completeness, and memory."""

import importlib
import re
from itertools import product
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpmp_kernels.pipeline.schedule import Action, Kind, Schedule
from tpmp_kernels.pipeline.schedules import SCHEDULES, build, peak_live
from tpmp_kernels.pipeline.schedules.orders import each, weave

# The file of each, and ranks, microbatches and chunks of the figure in its docstring.
FIGURES = {
    "gpipe": ("gpipe", 3, 4, 1),
    "1f1b": ("one_f_one_b", 3, 4, 1),
    "1f1b-eager": ("eager_one_f_one_b", 3, 6, 1),
    "interleaved-1f1b": ("interleaved_one_f_one_b", 2, 4, 2),
    "zb-h1": ("zb_h1", 3, 4, 1),
    "zb-h2": ("zb_h2", 3, 6, 1),
    "zb-v": ("zb_v", 2, 4, 2),
    "v-half": ("v_half", 2, 4, 2),
    "v-min": ("v_min", 2, 4, 2),
    "dualpipe-v": ("dualpipe_v", 2, 4, 2),
    "forward-only": ("forward_only", 3, 4, 1),
}


def words(schedule: Schedule, rank: int) -> str:
    return " ".join(f"{stage}{kind}{i}" for kind, stage, i in schedule.actions[rank])


def action(word: str, rank: int) -> Action:
    """2F1: F1 of stage 2; without a stage, that of the rank."""
    stage, kind, microbatch = re.fullmatch(r"(\d*)([A-Z]+)(\d+)", word).groups()
    return Action(Kind(kind), int(stage or rank), int(microbatch))


def drawn(line: str, rank: int) -> list[Action]:
    """A line of a figure as actions; F&BW is a joint step."""
    actions = []
    for word in line.split():
        parts = [action(part, rank) for part in word.split("&")]
        joint = [Action(Kind.PAIR, *parts[0][1:])] if len(parts) == 2 else []
        actions += joint + parts
    return actions


@pytest.mark.parametrize("name", FIGURES)
def test_figures_in_the_docstrings_are_the_orders(name):
    file, ranks, microbatches, chunks = FIGURES[name]
    module = importlib.import_module(f"tpmp_kernels.pipeline.schedules.{file}")
    lines = re.findall(r"^ *rank (\d+) +(.*)$", module.__doc__, re.MULTILINE)
    assert [int(rank) for rank, _ in lines] == list(range(ranks))
    schedule = build(name, ranks=ranks, microbatches=microbatches, chunks=chunks)
    assert [drawn(line, int(rank)) for rank, line in lines] == [list(order) for order in schedule.actions]


@pytest.mark.parametrize(
    "name, ranks, microbatches, chunks, orders",
    [
        ("1f1b-eager", 2, 2, 1, ["0F0 0F1 0BW0 0BW1", "1F0 1BW0 1F1 1BW1"]),
        ("1f1b-eager", 4, 2, 1, ["0F0 0F1 0BW0 0BW1", "1F0 1F1 1BW0 1BW1", "2F0 2F1 2BW0 2BW1", "3F0 3BW0 3F1 3BW1"]),
        ("zb-h1", 1, 2, 1, ["0F0 0B0 0W0 0F1 0B1 0W1"]),
        ("zb-h1", 2, 1, 1, ["0F0 0B0 0W0", "1F0 1B0 1W0"]),
        ("zb-h2", 2, 2, 1, ["0F0 0F1 0B0 0W0 0B1 0W1", "1F0 1B0 1F1 1B1 1W0 1W1"]),
        ("interleaved-1f1b", 2, 1, 3, ["0F0 2F0 4F0 4BW0 2BW0 0BW0", "1F0 3F0 5F0 5BW0 3BW0 1BW0"]),
        # Microbatch 3 of the order for four is left out.
        (
            *("interleaved-1f1b", 2, 3, 2),
            [
                "0F0 0F1 2F0 2F1 0F2 2BW0 2BW1 2F2 0BW0 0BW1 2BW2 0BW2",
                "1F0 1F1 3F0 3BW0 3F1 3BW1 1F2 1BW0 1BW1 3F2 3BW2 1BW2",
            ],
        ),
        # Of the orders for two and for four: joint steps whose F does not exist have lost their mark.
        ("dualpipe-v", 1, 1, 2, ["0F0 1F0 1BW0 0BW0"]),
        (
            *("dualpipe-v", 2, 3, 2),
            [
                "0F0 0F1 0F2 3F0 3B0 3W0 3F1 3BW1 3PAIR2 3F2 0BW0 3BW2 0BW1 0B2 0W2",
                "1F0 2F0 1F1 2F1 1F2 2BW0 2PAIR2 2F2 1BW0 2BW1 1BW1 2BW2 1BW2",
            ],
        ),
    ],
)
def test_small_orders(name, ranks, microbatches, chunks, orders):
    schedule = build(name, ranks=ranks, microbatches=microbatches, chunks=chunks)
    assert [words(schedule, rank) for rank in range(ranks)] == orders
    assert (schedule.name, schedule.microbatches) == (name, microbatches)
    assert schedule.placement == SCHEDULES[name].placement(ranks, chunks)


def test_names_stand_in_their_order():
    known = ["gpipe", "1f1b", "1f1b-eager", "interleaved-1f1b", "zb-h1", "zb-h2", "zb-v", "v-half", "v-min"]
    known += ["dualpipe-v", "forward-only"]
    assert list(SCHEDULES) == [name for name in known if name in SCHEDULES]
    assert set(FIGURES) <= set(SCHEDULES)


def of_torch(actions) -> list[Action]:
    """torch's actions as ours. Its joint steps have the F and the backward as their sub-actions."""
    kinds = {"FORWARD": Kind.F, "FULL_BACKWARD": Kind.BW, "BACKWARD_INPUT": Kind.B, "BACKWARD_WEIGHT": Kind.W}
    ours = []
    for theirs in actions:
        if theirs is not None and theirs.sub_actions:
            forward, backward = of_torch(theirs.sub_actions)
            ours += [Action(Kind.PAIR, forward.stage, forward.microbatch), forward, backward]
        elif theirs is not None:
            ours.append(Action(kinds[theirs.computation_type.name], theirs.stage_index, theirs.microbatch_index))
    return ours


def assert_equals_torch(torch_name: str, schedule: Schedule, **more):
    torch_schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    sizes = SimpleNamespace(pp_group_size=schedule.ranks, _n_microbatches=schedule.microbatches, **more)
    order_of = getattr(torch_schedules, torch_name)._calculate_single_rank_operations
    for rank in range(schedule.ranks):
        assert list(schedule.actions[rank]) == of_torch(order_of(sizes, rank))


@pytest.mark.parametrize("ranks, groups, chunks", list(product((1, 2, 3, 4, 8), (1, 2, 5), (1, 2, 3, 4))))
def test_interleaved_1f1b_is_that_of_torch(ranks, groups, chunks):
    schedule = build("interleaved-1f1b", ranks=ranks, microbatches=groups * ranks, chunks=chunks)
    sizes = {"n_local_stages": chunks, "microbatches_per_round": ranks}
    assert_equals_torch("ScheduleInterleaved1F1B", schedule, **sizes)


@pytest.mark.parametrize("ranks, more", list(product((1, 2, 3, 4, 5, 8), (0, 1, 2, 9))))
def test_dualpipe_v_is_that_of_torch(ranks, more):
    schedule = build("dualpipe-v", ranks=ranks, microbatches=2 * ranks + more)
    assert_equals_torch("ScheduleDualPipeV", schedule)


def test_interleaved_1f1b_of_one_chunk_is_eager():
    for ranks, microbatches in [(1, 3), (4, 4), (4, 12), (5, 10)]:
        one = build("interleaved-1f1b", ranks=ranks, microbatches=microbatches, chunks=1)
        assert one.actions == build("1f1b-eager", ranks=ranks, microbatches=microbatches).actions


@st.composite
def any_sizes(draw) -> tuple[str, dict[str, int]]:
    """A schedule and sizes for it up to 64 ranks, 8 chunks and 256 microbatches, of at most 6,000 forwards."""
    name = draw(st.sampled_from(list(FIGURES)))
    ranks = draw(st.integers(1, 64))
    chunks = draw(st.integers(1, 8)) if SCHEDULES[name].chunks is None else SCHEDULES[name].chunks
    microbatches = draw(st.integers(1, max(1, min(256, 6000 // (ranks * chunks)))))
    return name, {"ranks": ranks, "microbatches": microbatches, "chunks": chunks}


def peak_over(order: tuple[Action, ...], backward: bool) -> int:
    """Peak of the activations held, each from its F to its weight gradient, or just in its F without backwards."""
    live = peak = 0
    for kind, _, _ in order:
        live += kind == Kind.F
        peak = max(peak, live)
        live -= kind in (Kind.W, Kind.BW) or (kind == Kind.F and not backward)
    return peak


@settings(deadline=None, max_examples=60)
@given(any_sizes())
def test_every_action_is_there_once_and_in_order(drawn_sizes):
    """F before B before W of each microbatch; for each stage all three kinds by increasing microbatch."""
    name, sizes = drawn_sizes
    schedule = build(name, **sizes)
    for rank, order in enumerate(schedule.actions):
        done = {}
        for kind, stage, i in order:
            for part in kind if kind is not Kind.PAIR else "":
                line = done.setdefault((part, stage), [])
                assert part == "F" or i < len(done["F" if part == "B" else "B", stage])
                line.append(i)
        stages = [stage for stage, holder in enumerate(schedule.placement) if holder == rank]
        parts = "FBW" if schedule.backward else "F"
        assert done == {(part, stage): list(range(schedule.microbatches)) for part in parts for stage in stages}


@settings(deadline=None, max_examples=60)
@given(any_sizes())
def test_every_pair_marks_a_forward_and_the_backward_after_it(drawn_sizes):
    name, sizes = drawn_sizes
    schedule = build(name, **sizes)
    pairs = 0
    for order in schedule.actions:
        for at, (kind, stage, i) in enumerate(order):
            if kind is Kind.PAIR:
                forward, backward = order[at + 1 : at + 3]
                assert forward == Action(Kind.F, stage, i)
                assert backward.kind is Kind.BW and backward.stage != stage
                pairs += 1
    if name != "dualpipe-v":
        assert pairs == 0
    elif sizes["microbatches"] >= 2 * sizes["ranks"]:
        p, m = sizes["ranks"], sizes["microbatches"]
        assert pairs == sum(2 * (m - 2 * p + rank + 1) + p - 1 - rank for rank in range(p)) - 1


@settings(deadline=None, max_examples=100)
@given(any_sizes())
def test_peak_live_is_the_peak_over_the_order(drawn_sizes):
    name, sizes = drawn_sizes
    schedule = build(name, **sizes)
    ranks, microbatches = sizes["ranks"], sizes["microbatches"]
    exact = {"interleaved-1f1b": microbatches % ranks == 0, "dualpipe-v": microbatches >= 2 * ranks}.get(name, True)
    exact &= name not in ("zb-v", "v-half", "v-min")  # these have a limit and use what helps
    for rank, order in enumerate(schedule.actions):
        held, bound = peak_over(order, schedule.backward), peak_live(name, rank, **sizes)
        assert held == bound if exact else held <= bound


@pytest.mark.parametrize("name, multiple", [("interleaved-1f1b", 1), ("dualpipe-v", 2)])
@settings(deadline=None, max_examples=30)
@given(ranks=st.integers(1, 16), microbatches=st.integers(1, 40))
def test_what_is_left_out_leaves_the_rest_as_it_was(name, multiple, ranks, microbatches):
    """The order for too few microbatches is that for enough of them, without the others."""
    enough = -(-microbatches // ranks) * ranks if multiple == 1 else max(microbatches, 2 * ranks)
    whole, part = (build(name, ranks=ranks, microbatches=m) for m in (enough, microbatches))
    for order, longer in zip(part.actions, whole.actions, strict=True):
        assert order == tuple(a for a in longer if a.microbatch < microbatches)


def test_weave():
    a, b = each(Kind.F, 2, range(3)), each(Kind.BW, 2, [5])
    assert a == [Action(Kind.F, 2, i) for i in range(3)]
    assert type(a[0]) is Action
    assert weave(a, [None, *b]) == [a[0], a[1], b[0], a[2]]
    assert weave([], []) == []


@pytest.mark.parametrize(
    "name, sizes, fault",
    [
        ("zb-h3", {}, "'zb-h3' is unknown; did you mean 'zb-h"),
        ("interleaved-1f1b", {"chunks": 0}, "interleaved-1f1b: chunks is 0; expected at least 1"),
        ("interleaved-1f1b", {"ranks": 0}, "interleaved-1f1b: ranks is 0; expected at least 1"),
        ("dualpipe-v", {"chunks": 3}, "dualpipe-v: chunks is 3; it has 2 on each rank"),
        ("zb-h1", {"chunks": 2}, "zb-h1: chunks is 2; it has 1 on each rank"),
        ("1f1b-eager", {"microbatches": -1}, "1f1b-eager: microbatches is -1; expected at least 1"),
    ],
)
def test_bad_parameters_are_refused(name, sizes, fault):
    with pytest.raises(ValueError, match=re.escape(fault)):
        build(name, **{"ranks": 2, "microbatches": 2, **sizes})
