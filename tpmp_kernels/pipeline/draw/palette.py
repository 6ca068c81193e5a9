"""Colours and words of each kind of event. A rank's later stages (chunks) are lighter shades of the same colour."""

from collections.abc import Iterable

from tpmp_kernels.pipeline.schedule import Event

COLOURS = {"F": "#6ea8e0", "B": "#4fb8a5", "BW": "#f2a65a", "W": "#8cc66d", "opt": "#b5a4d6", "comm": "#d9534f"}
WORDS = {
    "F": "forward",
    "B": "backward, input gradient",
    "BW": "backward",
    "W": "backward, weight gradient",
    "opt": "optimizer",
    "comm": "blocked in communication",
}
COMPUTES = ("F", "B", "BW", "W")
IDLE, INK, GRID, MEMORY, PAPER = "#eceff1", "#263238", "#b0bec5", "#90a4ae", "#ffffff"

_LIGHTEST = 0.55  # share of white in the last chunk's shade: still apart from IDLE


def shade(kind: str, chunk: int, chunks: int) -> str:
    """The colour of a kind for one of so many chunks: chunk 0 as it is, the last one lightest."""
    if chunk == 0:
        return COLOURS[kind]
    white = _LIGHTEST * chunk / (chunks - 1)
    channels = (int(COLOURS[kind][at : at + 2], 16) for at in (1, 3, 5))
    return "#" + "".join(f"{round(channel + (255 - channel) * white):02x}" for channel in channels)


def chunk_numbers(events: Iterable[Event]) -> dict[int, int]:
    """stage -> chunk, for the stages that a rank computes: numbered from 0 in their order."""
    stages = sorted({event.stage for event in events if event.kind in COMPUTES})
    return {stage: chunk for chunk, stage in enumerate(stages)}
