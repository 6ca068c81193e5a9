"""What is drawn: a measured step as one SVG, and simulated steps on one sheet to compare."""

from collections.abc import Sequence

from tpmp_kernels.pipeline.draw.layout import lay_out
from tpmp_kernels.pipeline.draw.palette import COLOURS
from tpmp_kernels.pipeline.draw.panel import Panel, Row, Terms, Title
from tpmp_kernels.pipeline.draw.sheet import Sheet
from tpmp_kernels.pipeline.draw.svg import to_svg
from tpmp_kernels.pipeline.draw.table import COLUMNS, cells
from tpmp_kernels.pipeline.schedule import Event, Kind
from tpmp_kernels.pipeline.simulation import Simulation

_MEASURED = Terms(1e3, " ms", "time in ms", blocked="blocked in communication", idle="idle")
_SIMULATED = Terms(1, "", "time in units of the costs", blocked="exposed transfer", idle="bubble")


def timeline_svg(
    events: Sequence[Sequence[Event]], *, title: str = "", predicted: Sequence[Sequence[Event]] = ()
) -> str:
    """One SVG document. `events[rank]`: what the rank did, in seconds of one clock; the earliest start becomes 0.
    predicted: the same from the simulator, drawn below in the same scale.

    Boxes are F, B, W, BW and opt with the microbatch in them where it fits; background is idle time, the bubble.
    Blocked time ("comm") is a strip along the foot of the row, since it may lie within a box. Hovering names each.
    Raises ValueError where there is nothing to draw, for an unknown kind, and for an end before its start.
    """
    _check(events)
    everything = [event for row in events for event in row]
    span = max(event.end for event in everything) - min(event.start for event in everything) or 1e-9
    busy = sum(event.end - event.start for event in everything if event.kind != "comm")
    idle = max(0.0, 1 - busy / (span * len(events)))
    facts = f"{len(events)} ranks, {_MEASURED.time(span)} ms, idle {idle:.1%}"
    names = ("measured", "predicted from its median times") if predicted else ("",)
    panels = [
        Panel(Title(name), [Row(row) for row in rows]) for name, rows in zip(names, (events, predicted), strict=False)
    ]
    return to_svg(lay_out(panels, _MEASURED, title=Title(title, facts), widest=2400))


def _check(events: Sequence[Sequence[Event]]) -> None:
    if not any(events):
        raise ValueError("timeline_svg: there are no events; pass one list of Event for each rank, not all empty")
    for rank, row in enumerate(events):
        for event in row:
            if event.kind not in COLOURS:
                raise ValueError(
                    f"timeline_svg: rank {rank} has an event of kind {event.kind!r}; expected {', '.join(COLOURS)}"
                )
            if event.end < event.start:
                raise ValueError(f"timeline_svg: rank {rank} has {event}, which ends before it starts")


def schedule_sheet(simulations: Sequence[Simulation], *, title: str = "") -> Sheet:
    """A table of all, and for each a panel with its rows and, below, every rank's activations over time.

    All panels share one scale of time and one of memory. table.py says what the table has.
    Raises ValueError where there is nothing to draw.
    """
    if not simulations or not all(any(simulation.starts) for simulation in simulations):
        raise ValueError("schedule_sheet: there is nothing to draw; pass simulations of schedules that have actions")
    plain = all(simulation.costs.activation == 1 for simulation in simulations)
    unit = "microbatches" if plain else "units of the costs"
    terms = _SIMULATED._replace(memory=f"activations held on the rank, in {unit}")
    table = [COLUMNS, *(cells(simulation.schedule.name, simulation) for simulation in simulations)]
    panels = [_panel(simulation) for simulation in simulations]
    return lay_out(panels, terms, title=Title(title), table=table, widest=3600)


def _panel(simulation: Simulation) -> Panel:
    schedule = simulation.schedule
    facts = f"{schedule.ranks} ranks, {schedule.stages} stages, {schedule.microbatches} microbatches"
    rows = [
        Row(events, _joint_steps(simulation, rank), simulation.memory(rank))
        for rank, events in enumerate(simulation.events())
    ]
    return Panel(Title(schedule.name, facts), rows)


def _joint_steps(simulation: Simulation, rank: int) -> list[tuple[float, float]]:
    timed = zip(simulation.schedule.actions[rank], simulation.starts[rank], simulation.ends[rank], strict=True)
    return [(start, end) for (kind, _, _), start, end in timed if kind is Kind.PAIR]
