"""The table by which schedules are compared, on a sheet and in a terminal: its columns and its cells as text."""

from tpmp_kernels.pipeline.draw.scale import short
from tpmp_kernels.pipeline.simulation import Simulation

COLUMNS = ("schedule", "stages", "makespan", "bubble", "bubble in span", "peak memory", "transfers", "exposed transfer")


def cells(title: str, simulation: Simulation) -> tuple[str, ...]:
    """Peak memory is that of the rank that has most; exposed transfer is the mean over the ranks as a share of the
    makespan, as is the bubble, of which it is a part."""
    return (
        title,
        str(simulation.schedule.stages),
        short(simulation.makespan),
        share(simulation.bubble, simulation.makespan),
        share(simulation.span_bubble, simulation.span),
        short(max(simulation.peak_memory)),
        f"{simulation.messages:,}",
        share(sum(simulation.exposed), simulation.makespan * simulation.schedule.ranks),
    )


def share(part: float, whole: float) -> str:
    return f"{float(part / whole if whole else 0):.1%}"
