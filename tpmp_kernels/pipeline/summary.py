"""The figures by which schedules are compared, as text for a terminal and as JSON."""

import json
import math
from dataclasses import asdict, dataclass

from tpmp_kernels.pipeline.draw.scale import short
from tpmp_kernels.pipeline.draw.table import COLUMNS, cells, share
from tpmp_kernels.pipeline.schedule import Kind, Schedule
from tpmp_kernels.pipeline.simulation import Simulation
from tpmp_kernels.pipeline.validate import Report


@dataclass(frozen=True)
class Shown:
    """A schedule with all that is said about it.

    title: its name, or the file that it is from. bounded: whether its memory was held against a closed form.
    table, partition: the layers of a model in its stages, as text and for JSON; None where no model is cut.
    """

    title: str
    schedule: Schedule
    simulation: Simulation
    report: Report
    bounded: bool
    table: str | None = None
    partition: dict | None = None


def heading(shown: Shown) -> str:
    schedule = shown.schedule
    return (
        f"{shown.title}: {_plural(schedule.ranks, 'rank')}, {_plural(schedule.stages, 'stage')}, "
        f"{_plural(schedule.microbatches, 'microbatch', 'es')}"
    )


def figures(shown: Shown) -> str:
    """One line for each figure of one schedule."""
    simulation = shown.simulation
    unit = "microbatches of activations" if simulation.costs.activation == 1 else "the unit of activation"
    unit = "MB of activations" if shown.partition else unit
    lines = {
        "makespan": short(simulation.makespan),
        "bubble": f"{short(simulation.bubble)}, {share(simulation.bubble, simulation.makespan)} of the makespan",
        "bubble in span": f"{short(simulation.span_bubble)}, {share(simulation.span_bubble, simulation.span)} of the "
        "longest span (a rank's first start to its last end)",
        "peak memory": f"{_by_rank(simulation.peak_memory)}, in {unit}",
        "transfers": f"{simulation.messages:,}",
        "exposed transfer": _by_rank(simulation.exposed),
    }
    return "\n".join(f"{label:<17} {text}" for label, text in lines.items())


def table(several: list[Shown]) -> str:
    """One row for each schedule, as in the table on a sheet, the numbers right-aligned."""
    rows = [COLUMNS, *(cells(shown.title, shown.simulation) for shown in several)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *numbers in rows:
        aligned = (number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True))
        lines.append("  ".join([name.ljust(widths[0]), *aligned]))
    return "\n".join(lines)


def proof(shown: Shown) -> str:
    report = shown.report
    live = "peak live within the closed form"
    if not shown.bounded:
        live = f"peak live activations {_by_rank(report.peak_live)}"
    return (
        f"proved: {_plural(report.actions, 'action')}, {_plural(report.messages, 'message')}, free of deadlock under "
        f"any buffering, {live}"
    )


def as_json(several: list[Shown]) -> str:
    """One object. `timeline`: for each rank, [kind, stage, microbatch, start, end] of each compute in order. `costs`:
    of each schedule where it has those of its partition, else of all."""
    common = {} if several[0].partition else {"costs": _costs(several[0])}
    return json.dumps({**common, "schedules": [_fields(each) for each in several]}, allow_nan=False)


def _costs(shown: Shown) -> dict:
    costs = asdict(shown.simulation.costs)
    return {**costs, "bandwidth": None} if costs["bandwidth"] == math.inf else costs  # JSON has no infinity


def _fields(shown: Shown) -> dict:
    simulation, schedule = shown.simulation, shown.schedule
    return {
        **({"costs": _costs(shown), "partition": shown.partition} if shown.partition else {}),
        "title": shown.title,
        "name": schedule.name,
        "ranks": schedule.ranks,
        "stages": schedule.stages,
        "microbatches": schedule.microbatches,
        "placement": schedule.placement,
        "backward": schedule.backward,
        "makespan": simulation.makespan,
        "bubble": simulation.bubble,
        "bubble_ratio": simulation.bubble_ratio,
        "span": simulation.span,
        "span_bubble": simulation.span_bubble,
        "busy": simulation.busy,
        "exposed": simulation.exposed,
        "peak_memory": simulation.peak_memory,
        "messages": simulation.messages,
        "proved": {**asdict(shown.report), "closed_form": shown.bounded},
        "timeline": [
            [[*action, start, end] for action, start, end in zip(*rank, strict=True) if action.kind is not Kind.PAIR]
            for rank in zip(simulation.schedule.actions, simulation.starts, simulation.ends, strict=True)
        ],
    }


def _by_rank(values: tuple[float, ...]) -> str:
    texts = list(map(short, values))
    if len(set(texts)) == 1:
        return f"{texts[0]} on every rank"
    if len(texts) <= 8:
        return f"{' '.join(texts)} by rank"
    return f"{short(min(values))} to {short(max(values))} by rank"


def _plural(count: int, noun: str, ending: str = "s") -> str:
    return f"{count:,} {noun}{ending if count != 1 else ''}"
