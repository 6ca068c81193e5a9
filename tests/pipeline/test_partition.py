"""`partition` against brute force over all contiguous splits: its objective, memory limits, overrides, and what the
simulator makes of its costs."""

import ast
import itertools
import math
import random
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tpmp_kernels.pipeline import partition as module
from tpmp_kernels.pipeline import partition_search
from tpmp_kernels.pipeline.costs import Costs
from tpmp_kernels.pipeline.partition import LayerCost, TooLittleMemory, partition, rounded_up
from tpmp_kernels.pipeline.schedules import SCHEDULES, build, peak_live
from tpmp_kernels.pipeline.schedules.placement import folded, looped
from tpmp_kernels.pipeline.simulate import simulate

ALONE = [(ranks, tuple(range(ranks))) for ranks in (1, 2, 3, 4)]
SHARED = [(1, (0, 0, 0)), (2, folded(2)), (2, looped(2, 2)), (3, folded(3)), (3, (2, 0, 1, 0))]


def drawn(rng: random.Random, count: int) -> list[LayerCost]:
    """Few different numbers, so that there are ties to break."""
    return [
        LayerCost(f"layer.{i}", *rng.choices(range(4), k=3), message=rng.choice((0, 1, 2)), activation=rng.randrange(4),
                  parameters=rng.randrange(6))
        for i in range(count)
    ]  # fmt: skip


def every(layers, placement):
    """All splits, as one range of layers for each stage."""
    for inner in itertools.combinations(range(1, len(layers)), len(placement) - 1):
        yield [range(a, b) for a, b in itertools.pairwise((0, *inner, len(layers)))]


def stage_times(split, layers, placement, transfer=lambda message: 0) -> list:
    times = []
    for stage, part in enumerate(split):
        time = sum(layers[i].F + layers[i].B + layers[i].W for i in part)
        if stage + 1 < len(split) and placement[stage] != placement[stage + 1]:
            time += transfer(layers[part[-1]].message)
        if stage and placement[stage] != placement[stage - 1]:
            time += transfer(layers[part[0] - 1].message)
        times.append(time)
    return times


def fullest(split, layers, placement, in_flight):
    memory = []
    for rank, count in enumerate(in_flight):
        mine = [part for part, holder in zip(split, placement, strict=True) if holder == rank]
        largest = max((sum(layers[i].activation for i in part) for part in mine), default=0)
        memory.append(count * largest + sum(layers[i].parameters for part in mine for i in part))
    return max(memory)


def value(split, layers, placement, in_flight, transfer=lambda message: 0):
    """What `partition` says that it makes as small as can be, in this order."""
    times = stage_times(split, layers, placement, transfer)
    ranks = [sum(t for t, holder in zip(times, placement, strict=True) if holder == r) for r in range(len(in_flight))]
    memory = fullest(split, layers, placement, in_flight)
    even = sum(time**2 for time in times) if len(set(placement)) == len(placement) else 0
    return max(ranks), max(times), memory, even


# The objective ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks, placement", ALONE + SHARED)
def test_no_split_is_better(ranks, placement):
    rng = random.Random(len(placement) * 10 + ranks)
    for trial in range(25):
        layers = drawn(rng, rng.randint(len(placement), 9))
        in_flight = [rng.randint(0, 4) for _ in range(ranks)]
        latency, bandwidth = [(0.0, math.inf), (2.0, math.inf), (0.0, 0.5), (1.0, 2.0)][trial % 4]
        found = partition(
            layers, ranks=ranks, placement=placement, in_flight=in_flight, latency=latency, bandwidth=bandwidth
        )
        assert found.optimal
        sizes = {
            "placement": placement,
            "in_flight": in_flight,
            "transfer": lambda m, a=latency, b=bandwidth: a + m / b,
        }
        best = min(value(split, layers, **sizes) for split in every(layers, placement))
        assert value([part.layers for part in found.parts], layers, **sizes) == best
        assert (max(found.rank_times), max(part.time for part in found.parts), max(found.rank_memory)) == best[:3]


@pytest.mark.parametrize("ranks, placement", ALONE + SHARED)
def test_a_memory_limit_is_kept_at_the_least_cost_in_time(ranks, placement):
    rng, refused = random.Random(ranks), 0
    for _ in range(25):
        layers = drawn(rng, rng.randint(len(placement), 8))
        in_flight = [rng.randint(1, 4) for _ in range(ranks)]
        given = {"placement": placement, "in_flight": in_flight}
        splits = list(every(layers, placement))
        needs = sorted({fullest(split, layers, **given) for split in splits})
        limit = rng.choice([*needs[:2], needs[0] - 0.5, needs[0] * 2]) or 0.25
        fitting = [split for split in splits if fullest(split, layers, **given) <= limit]
        if fitting:
            found = partition(layers, ranks=ranks, memory_limit=limit, **given)
            best = min(value(split, layers, **given) for split in fitting)
            assert value([part.layers for part in found.parts], layers, **given) == best
            continue
        refused += 1
        with pytest.raises(TooLittleMemory) as caught:
            partition(layers, ranks=ranks, memory_limit=limit, **given)
        assert (caught.value.least, caught.value.limit, caught.value.optimal) == (needs[0], limit, True)
        assert max(partition(layers, ranks=ranks, memory_limit=needs[0], **given).rank_memory) == needs[0]
    assert refused > 0


def test_without_enough_memory_the_sentence_says_how_much_is():
    layers = [LayerCost(f"layer.{i}", 1, 1, 1, activation=1.0, parameters=i / 7) for i in range(6)]
    with pytest.raises(TooLittleMemory) as caught:
        partition(layers, ranks=2, in_flight=[2, 1], memory_limit=3)
    least = re.fullmatch(
        r"partition: memory_limit is 3, but on 2 ranks the fullest needs ([\d.]+); expected at least that, more ranks, "
        r"or fewer microbatches in flight",
        str(caught.value),
    )[1]
    assert partition(layers, ranks=2, in_flight=[2, 1], memory_limit=float(least))


@pytest.mark.parametrize("number, text", [(0, "0"), (12341, "12350"), (12340, "12340"), (0.00012345, "0.0001235")])
def test_limits_are_rounded_up(number, text):
    assert float(rounded_up(number)) == float(text) >= number


def test_equal_layers_are_ties_in_floating_point_too():
    """0.1 ten times, added up from the first, is not the same between any three: the memory would decide nothing."""
    layers = [LayerCost(f"layer.{i}", 0.1, 0, 0, activation=1 + 9 * (i == 0)) for i in range(10)]
    assert [len(part.layers) for part in partition(layers, ranks=4).parts] == [1, 3, 3, 3]


def test_validation_counts_forwards_alone():
    layers = [LayerCost(f"layer.{i}", f, 9 - f, 5) for i, f in enumerate((1, 1, 1, 1, 1, 1, 6))]
    assert partition(layers, ranks=2, backward=False).rank_times == (6, 6)
    assert [len(part.layers) for part in partition(layers, ranks=2).parts] in ([3, 4], [4, 3])
    sends = {"latency": 1.0, "bandwidth": math.inf}
    assert partition(layers, ranks=2, backward=False, **sends).rank_times == (7, 6)
    assert partition(layers[:2], ranks=2, **sends).rank_times == (15, 15)


# No layer is dropped ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [0, 40, 50_000])
def test_every_layer_is_in_one_stage_and_an_unfinished_search_says_so(nodes, monkeypatch):
    """... and is no slower than the most even split."""
    monkeypatch.setattr(partition_search, "NODES", nodes)
    rng, proved = random.Random(nodes), set()
    for _ in range(12):
        layers = [replace(each, F=rng.randint(1, 30)) for each in drawn(rng, rng.randint(8, 13))]
        placement = rng.choice([folded(2), folded(4), looped(4, 2), looped(3, 2)])
        found = partition(layers, ranks=max(placement) + 1, placement=placement)
        parts = [part.layers for part in found.parts]
        assert [i for part in parts for i in part] == list(range(len(layers))) and all(parts)
        assert [part.rank for part in found.parts] == list(placement)
        assert [(layers[p[0]].name, layers[p[-1]].name) for p in parts] == [(p.first, p.last) for p in found.parts]
        for what in ("F", "B", "W", "activation", "parameters"):
            sums = [sum(getattr(layers[i], what) for i in part) for part in parts]
            assert [getattr(part, what) for part in found.parts] == sums
        flight = [1] * (max(placement) + 1)
        even = min(every(layers, placement), key=lambda s: sum(t**2 for t in stage_times(s, layers, placement)))
        assert max(found.rank_times) <= value(even, layers, placement, flight)[0]
        best = min(value(split, layers, placement, flight) for split in every(layers, placement))
        assert not found.optimal or value(parts, layers, placement, flight) == best
        proved.add(found.optimal)
    assert proved == {0: {False}, 40: {False, True}, 50_000: {True}}[nodes]


@pytest.mark.parametrize("nodes", [0, 2000])
def test_a_model_of_the_usual_size_is_split_well_before_the_search(nodes, monkeypatch):
    """32 layers of 3 and a head of 8, on 8 ranks of two stages: 13 a rank, so that 15 is the least with whole layers.
    Of the most even split one has 17, and no border alone makes that better."""
    monkeypatch.setattr(partition_search, "NODES", nodes)
    layers = [LayerCost("embed_tokens", 0, 0, 0), *(LayerCost(f"layers.{i}", 1, 1, 1) for i in range(32))]
    layers.append(LayerCost("lm_head", 2, 4, 2))
    for placement in (folded(8), looped(8, 2)):
        found = partition(layers, ranks=8, placement=placement)
        assert max(found.rank_times) == 15 and max(part.time for part in found.parts) == 9
    assert max(partition(layers, ranks=8).rank_times) == 15


# Overrides -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks, placement", [ALONE[2], ALONE[3], SHARED[1], SHARED[2]])
def test_overrides_are_kept_and_the_rest_is_the_best(ranks, placement):
    rng, stages = random.Random(7), len(placement)
    for _ in range(20):
        layers, flight = drawn(rng, 8), [1] * ranks
        some = sorted(rng.sample(range(1, stages), rng.randint(1, stages - 1)))
        model = rng.choice(list(every(layers, placement)))
        named = {layers[model[stage][0]].name: stage for stage in some}
        for overrides in (named, list(named), tuple(reversed(named))):
            found = partition(layers, ranks=ranks, placement=placement, overrides=overrides)
            fixed = isinstance(overrides, dict)

            def kept(firsts: list[str], named=named, fixed=fixed) -> bool:
                return all(firsts[stage] == name if fixed else name in firsts for name, stage in named.items())

            assert kept([part.first for part in found.parts])
            splits = (s for s in every(layers, placement) if kept([layers[part[0]].name for part in s]))
            best = min(value(split, layers, placement, flight) for split in splits)
            assert value([part.layers for part in found.parts], layers, placement, flight) == best


def test_the_name_of_one_layer_and_of_the_first():
    layers = [LayerCost(f"layer.{i}", 1, 1, 1) for i in range(6)]
    for overrides in ("layer.1", ["layer.1"], {"layer.1": 1}, {"layer.0": 0, "layer.1": 1}, ["layer.0", "layer.1"]):
        assert [len(part.layers) for part in partition(layers, ranks=2, overrides=overrides).parts] == [1, 5]


# Errors ----------------------------------------------------------------------------------------------------------

SIX = [LayerCost(f"layers.{i}", 1, 1, 1) for i in range(6)]
BAD = [
    ({"ranks": 7}, "7 stages need a layer each, got 6 layers, embedding and head included; use at most 6 stages"),
    ({"ranks": 2, "chunks": 4}, "8 stages need a layer each, got 6 layers"),
    ({"ranks": 0}, "ranks is 0 and chunks 1; expected at least 1 of each"),
    ({"ranks": 2, "placement": (0, 2)}, "placement is [0, 2]; expected ranks from 0 to 1"),
    ({"ranks": 2, "in_flight": [1]}, "in_flight is [1]; expected a count for each of 2 ranks"),
    ({"ranks": 2, "memory_limit": 0}, "memory_limit is 0; expected more than 0, or None for no limit"),
    ({"ranks": 2, "bandwidth": 0}, "latency is 0.0 and bandwidth 0; expected at least 0, and more than 0 or inf"),
    ({"ranks": 2, "overrides": ["layers.7"]}, "unknown layer 'layers.7'; the nearest known one is 'layers.5'"),
    ({"ranks": 2, "overrides": {"layer.5": 1}}, "unknown layer 'layer.5'; the nearest known one is 'layers.5'"),
    (
        {"ranks": 2, "overrides": ["layers.3", "layers.1"]},
        "layers.1, layers.3 are each to begin a stage behind the first, of which there are 1; leave 1 of them out",
    ),
    ({"ranks": 2, "overrides": {"layers.1": 2}}, "layers.1 is to begin stage 2; expected a stage from 0 to 1"),
    (
        {"ranks": 3, "overrides": {"layers.1": 1, "layers.2": 1}},
        "layers.1 and layers.2 are both to begin stage 1; leave one out",
    ),
    (
        {"ranks": 3, "overrides": {"layers.1": 0}},
        "layers.1 is to begin stage 0, which begins with layers.0; give layers.1 another stage",
    ),
    (
        {"ranks": 4, "overrides": {"layers.4": 1, "layers.2": 2}},
        "stage 1 is to begin with layers.4, but stage 2 begins with layers.2, which leaves 0 layers for 1 stages; ",
    ),
    (
        {"ranks": 4, "overrides": {"layers.1": 2}},
        "stage 0 is to begin with layers.0, but stage 2 begins with layers.1, which leaves 1 layers for 2 stages; ",
    ),
    (
        {"ranks": 4, "overrides": {"layers.4": 1}},
        "stage 1 is to begin with layers.4, but the last layer ends, which leaves 2 layers for 3 stages; expected one",
    ),
]


@pytest.mark.parametrize("arguments, sentence", BAD, ids=[sentence[:40] for _, sentence in BAD])
def test_bad_input_is_one_sentence(arguments, sentence):
    with pytest.raises(ValueError) as caught:
        partition(SIX, **arguments)
    assert str(caught.value).startswith(f"partition: {sentence}") and "\n" not in str(caught.value)


def test_bad_layers():
    with pytest.raises(ValueError, match=r"layer a: B is -1; expected a finite number of at least 0"):
        LayerCost("a", 1, -1, 1)
    with pytest.raises(ValueError, match=r"partition: two layers are called 'layers.3'; expected a name for each"):
        partition([*SIX, SIX[3]], ranks=2)


# What the simulator makes of it ----------------------------------------------------------------------------------


def skewed(rng: random.Random, count: int) -> list[LayerCost]:
    """A light embedding, layers of different weight, and a head of several layers."""
    work = [1, *(rng.randint(4, 10) for _ in range(count)), rng.randint(20, 60)]
    return [LayerCost(f"layer.{i}", w, w, w, message=8, activation=w, parameters=3) for i, w in enumerate(work)]


def even_costs(layers: list[LayerCost], stages: int) -> Costs:
    """Today's split: as many layers in each stage, embedding and head beside the first and the last of them."""
    inner = len(layers) - 2
    borders = [0, *(1 + stage * inner // stages for stage in range(1, stages)), len(layers)]
    parts = [layers[a:b] for a, b in itertools.pairwise(borders)]
    sums = {what: [sum(getattr(each, what) for each in part) for part in parts] for what in ("F", "B", "W")}
    return Costs(**sums, activation=[sum(each.activation for each in part) for part in parts])


@pytest.mark.parametrize("name", ["1f1b", "gpipe", "zb-h1", "interleaved-1f1b", "zb-v"])
def test_a_step_is_never_longer_than_with_the_even_split(name):
    rng, gained = random.Random(3), 0
    for _ in range(6):
        layers = skewed(rng, 12)
        schedule = build(name, ranks=3, microbatches=12)
        found = partition(layers, ranks=3, placement=schedule.placement)
        even, ours = even_costs(layers, schedule.stages), found.costs()
        if SCHEDULES[name].fed:
            schedules = [build(name, ranks=3, microbatches=12, costs=costs) for costs in (even, ours)]
        else:
            schedules = [schedule, schedule]
        before, after = (simulate(s, costs) for s, costs in zip(schedules, (even, ours), strict=True))
        assert after.makespan <= before.makespan
        assert after.busy == tuple(12 * time for time in found.rank_times)
        gained += before.makespan / after.makespan - 1
    assert gained / 6 > 0.1, "or these models are not skewed"


def test_memory_is_the_peak_of_the_simulation_and_the_parameters():
    layers = skewed(random.Random(1), 8)
    for name in ("1f1b", "gpipe", "zb-h2", "zb-v", "v-half"):
        schedule = build(name, ranks=3, microbatches=7)
        chunks = schedule.stages // 3
        in_flight = [peak_live(name, rank, ranks=3, microbatches=7, chunks=chunks) for rank in range(3)]
        found = partition(layers, ranks=3, placement=schedule.placement, in_flight=in_flight)
        parameters = [sum(part.parameters for part in found.parts if part.rank == rank) for rank in range(3)]
        peaks = [a + p for a, p in zip(simulate(schedule, found.costs()).peak_memory, parameters, strict=True)]
        assert all(peak <= memory for peak, memory in zip(peaks, found.rank_memory, strict=True))
        assert chunks == 2 or peaks == list(found.rank_memory)


def test_costs_take_the_transfers_along():
    layers = [LayerCost(f"layer.{i}", 1, 1, 1, message=i) for i in range(6)]
    found = partition(layers, ranks=2, placement=folded(2), latency=0.5, bandwidth=4, overrides=["layer.4"])
    assert [part.message for part in found.parts][1::2] == [0, 0], "the turn of a V, and the end"
    costs = found.costs(kept=0.5)
    assert (costs.latency, costs.bandwidth, costs.kept) == (0.5, 4, 0.5)
    assert costs.message == max(found.parts[0].message, found.parts[2].message) == 3
    assert found.costs(latency=2).latency == 2


def test_only_the_standard_library_is_imported():
    for file in Path(module.__file__).parent.glob("partition*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
        outside = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
        assert outside <= {"tpmp_kernels"} and all(
            name.split(".")[:2] == ["tpmp_kernels", "pipeline"] for name in names if name.startswith("tpmp_kernels")
        )
