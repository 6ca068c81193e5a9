"""The last step of a run, measured over predicted: timeline.svg, timeline.json for Perfetto, and the line to print."""

import json
from pathlib import Path

import torch.distributed as dist

from tpmp_kernels.pipeline.draw import events_trace, timeline_svg
from tpmp_kernels.pipeline.measured import measured
from tpmp_kernels.pipeline.schedule import Event
from tpmp_kernels.pipeline.simulate import simulate
from tpmp_kernels.pipeline.simulation import Simulation
from tpmp_kernels.training.layout import Layout
from tpmp_kernels.training.trainer import Trainer


def draw(trainer: Trainer, where: Layout, folder: Path, title: str) -> str | None:
    """Writes both files and returns the line, on rank 0. Collective."""
    gathered: list = [None] * where.world.size
    dist.all_gather_object(gathered, (where.pp.rank, where.tp.rank, *trainer.times))
    if where.world.rank != 0:
        return None
    lowered = trainer.runtime.lowered
    origin = min(times[0][0] for _, _, times, _ in gathered)
    columns = [_column(gathered, tp) for tp in range(where.tp.size)]
    passes = [measured(lowered, column) for column in columns]
    rows = [_row(passes[tp], columns[tp], pp, optimizer, origin) for pp, tp, _, optimizer in gathered]
    predicted = simulate(lowered, passes[0].costs)
    expected = predicted.events()
    (folder / "timeline.svg").write_text(timeline_svg(rows, title=title, predicted=expected))
    (folder / "timeline.json").write_text(json.dumps(events_trace(rows, predicted=expected)))
    return _line(passes[0], predicted)


def _column(gathered: list, tp: int) -> list:
    """The times of the pipeline's ranks, of those that are tensor-parallel rank `tp`."""
    return [times for _, _, times, _ in sorted(each for each in gathered if each[1] == tp)]


def _row(took: Simulation, column: list, pp: int, optimizer: tuple[float, float], origin: float) -> list[Event]:
    """What one rank did, from the first start of all."""
    shift = min(times[0][0] for times in column) - origin
    events = [each._replace(start=each.start + shift, end=each.end + shift) for each in took.events()[pp]]
    start, end = optimizer
    return [*events, Event("opt", None, None, start - origin, end - origin)]


def _line(took: Simulation, predicted: Simulation) -> str:
    exposed = sum(took.exposed) / len(took.exposed)
    return (
        f"last step: bubble {took.bubble_ratio:.1%} (predicted {predicted.bubble_ratio:.1%}), "
        f"{1e3 * took.makespan:.1f} ms to the last gradient (predicted {1e3 * predicted.makespan:.1f}), "
        f"exposed transfer {1e3 * exposed:.2f} ms a rank"
    )
