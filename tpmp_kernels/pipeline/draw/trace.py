"""The events of a step as a trace that Perfetto (ui.perfetto.dev) and chrome://tracing open.

Every rank is a process with two threads, its computes and what it was blocked by, and a counter of its activations.
"""

from collections.abc import Sequence

from tpmp_kernels.pipeline.schedule import Event
from tpmp_kernels.pipeline.simulation import Simulation

_COMPUTE, _BLOCKED = 0, 1
_THREADS = {_COMPUTE: "compute", _BLOCKED: "blocked in communication"}


def chrome_trace(simulation: Simulation, *, unit: float = 1e-3) -> dict:
    """The simulated step, for json.dump. unit: seconds that one unit of its costs stands for."""
    memory = [simulation.memory(rank) for rank in range(simulation.schedule.ranks)]
    return events_trace(simulation.events(), memory=memory, unit=unit)


def events_trace(
    events: Sequence[Sequence[Event]],
    *,
    memory: Sequence[Sequence[tuple[float, float]]] = (),
    predicted: Sequence[Sequence[Event]] = (),
    unit: float = 1.0,
) -> dict:
    """The same from events[rank] and memory[rank], points (time, level) that hold until the next one. predicted: of
    the same ranks, from the simulator; processes of their own behind the others.

    unit: seconds in one unit of their times. Raises ValueError where it is not above 0.
    """
    if not unit > 0:
        raise ValueError(f"trace: unit is {unit}; expected seconds above 0 for one unit of time")
    micro = unit * 1e6
    names = [f"rank {rank}" for rank in range(len(events))]
    names += [f"rank {rank}, predicted" for rank in range(len(predicted))]
    rows = [entry for rank, name in enumerate(names) for entry in _names(rank, name)]
    rows += [_complete(rank, event, micro) for rank, row in enumerate([*events, *predicted]) for event in row]
    rows += [_counter(rank, time * micro, level) for rank, row in enumerate(memory) for time, level in row]
    return {"traceEvents": rows, "displayTimeUnit": "ms"}


def _names(rank: int, name: str) -> list[dict]:
    """Metadata: what the process and its threads are called, and that they stand in order."""
    process = {"ph": "M", "pid": rank}
    return [
        {**process, "name": "process_name", "args": {"name": name}},
        {**process, "name": "process_sort_index", "args": {"sort_index": rank}},
        *({**process, "tid": tid, "name": "thread_name", "args": {"name": name}} for tid, name in _THREADS.items()),
    ]


def _complete(rank: int, event: Event, micro: float) -> dict:
    known = {"stage": event.stage, "microbatch": event.microbatch}
    numbered = event.microbatch is not None and event.kind != "comm"
    return {
        "ph": "X",
        "pid": rank,
        "tid": _BLOCKED if event.kind == "comm" else _COMPUTE,
        "name": f"{event.kind}{event.microbatch}" if numbered else str(event.kind),
        "cat": str(event.kind),
        "ts": event.start * micro,
        "dur": (event.end - event.start) * micro,
        "args": {name: number for name, number in known.items() if number is not None},
    }


def _counter(rank: int, microseconds: float, level: float) -> dict:
    args = {"microbatches": float(level)}
    return {"ph": "C", "pid": rank, "name": "activations", "ts": microseconds, "args": args}
