"""`tpmp schedule --model`: the layers of a model cut into the stages of each schedule, and the table that shows it.

    tpmp schedule 1f1b --model examples/demo.toml --stages 3 --begin layers.2 --memory-limit 80GB

Reading a model file is the part of rooms above this one: `Reader` is what the command is given for it.
"""

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tpmp_kernels.errors import UsageError
from tpmp_kernels.pipeline.costs import Costs
from tpmp_kernels.pipeline.draw.scale import short
from tpmp_kernels.pipeline.draw.table import share
from tpmp_kernels.pipeline.partition import LayerCost, Part, Partition, TooLittleMemory, partition, rounded_up
from tpmp_kernels.pipeline.schedule import Schedule

_OF_THE_MODEL = ("F", "B", "W", "BW", "message", "activation")  # costs that --costs cannot give beside it


@dataclass(frozen=True)
class Model:
    """A model file, as far as it is asked for here.

    ranks, microbatches: what it says, for where the command line does not. layers: what its layers cost, with so many
    microbatches in a step, of which each is so much smaller. unit: of their times, memory being in MB; origin: how they
    were found.
    """

    ranks: int
    microbatches: int
    unit: str
    origin: str
    layers: Callable[[int], Sequence[LayerCost]]


Reader = Callable[[Path, bool], Model]


def read(options: Namespace, reader: Reader) -> Model | None:
    """None without --model, whose options are then refused."""
    if options.model is None:
        for option in ("measured", "memory_limit", "begin"):
            if getattr(options, option):
                flag = f"--{option.replace('_', '-')}"
                raise UsageError(f"{flag}: expected --model beside it, got none; such as --model examples/demo.toml")
        return None
    for name in options.costs or {}:
        if name in _OF_THE_MODEL:
            raise UsageError(f"--costs: {name} comes from --model, got it here too; leave it out, or leave out --model")
    try:
        return reader(options.model, bool(options.measured))
    except OSError as error:
        raise UsageError(
            f"--model: {str(options.model)!r} cannot be read ({error.strerror}); expected a config, check the path"
        ) from None


def split(schedule: Schedule, layers: Sequence[LayerCost], in_flight: Sequence[int], options: Namespace) -> Partition:
    """The best partition for the stages of a schedule. UsageError where there is none."""
    given = options.costs or {}
    try:
        return partition(
            layers,
            ranks=schedule.ranks,
            placement=schedule.placement,
            in_flight=in_flight,
            memory_limit=options.memory_limit,
            backward=schedule.backward,
            overrides=options.begin or (),
            **{each: given[each] for each in ("latency", "bandwidth") if each in given},
        )
    except TooLittleMemory as error:
        least = f"{rounded_up(error.least)} MB{'' if error.optimal else ' (the least that was found)'}"
        raise UsageError(
            f"--memory-limit: expected at least {least} for {schedule.name} on {schedule.ranks} ranks, got "
            f"{error.limit:g} MB; give that, more ranks, or more and so smaller microbatches"
        ) from None
    except ValueError as error:
        raise UsageError(f"--model: {str(error).removeprefix('partition: ')}") from None


def costs(split: Partition, options: Namespace) -> Costs:
    """With what --costs may say beside a model: pair, latency, bandwidth and kept."""
    return split.costs(**(options.costs or {}))


def table(split: Partition, model: Model) -> str:
    """A line for each stage, numbers right-aligned; below, what they are in and how even the split is."""
    largest = max(part.time for part in split.parts)
    name = max(len(_layers(part)) for part in split.parts)
    rows = [("stage", "rank", "layers".ljust(name), "F", "B", "W", "of largest", "memory of rank")]
    for part in split.parts:
        numbers = (short(part.F), short(part.B), short(part.W), share(part.time, largest))
        memory = short(split.rank_memory[part.rank])
        rows.append((str(part.stage), str(part.rank), _layers(part).ljust(name), *numbers, memory))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.rjust, row, widths)) for row in rows]
    slowest, mean = max(split.rank_times), sum(split.rank_times) / len(split.rank_times)
    proved = "" if split.optimal else "; the best split found, not proved to be the best there is"
    lines.append(f"times of a microbatch in {model.unit}, {model.origin}; memory in MB, with all that is in flight")
    lines.append(f"slowest rank {short(slowest)}, {share(slowest, mean)} of the mean{proved}")
    return "\n".join(lines)


def _layers(part: Part) -> str:
    return part.first if len(part.layers) == 1 else f"{part.first} .. {part.last}"


def fields(split: Partition, model: Model) -> dict:
    """For JSON. `layers` of a stage: how many."""
    parts = [{**asdict(part), "layers": len(part.layers)} for part in split.parts]
    return {
        "unit": model.unit,
        "origin": model.origin,
        "optimal": split.optimal,
        "rank_times": split.rank_times,
        "rank_memory": split.rank_memory,
        "stages": parts,
    }
