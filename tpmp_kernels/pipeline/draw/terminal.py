"""The picture in characters: a line for each rank, columns of time, and the rank's peak of memory behind.

    time     0              5              peak
    rank 0   F0 F1       BW0      BW1      2
    rank 1      F0 BW0   F1 BW1            1

That is the figure of the docstrings in schedules/, with & in a joint step, and the stage before the kind where a rank
has several. With colours the background tells the kind, lighter for odd chunks, and only the number is written.
"""

import math
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

from tpmp_kernels.pipeline.draw.palette import COMPUTES, WORDS
from tpmp_kernels.pipeline.draw.scale import round_step, short, ticks
from tpmp_kernels.pipeline.schedule import Kind
from tpmp_kernels.pipeline.simulation import Simulation

_NARROWEST = 40
_MOST_LINES = 100  # a picture of more lines is drawn smaller
# Of the 256 colours that terminals have, those nearest to the palette: for even chunks, and lighter for odd ones.
_ANSI = {"F": (75, 153), "B": (79, 158), "BW": (215, 223), "W": (113, 193), "comm": (203, 203)}


class _Box(NamedTuple):
    """joint: of a joint step, 1 for the forward and 2 for the backward; else 0."""

    kind: str
    stage: int | None
    microbatch: int | None
    start: float
    end: float
    chunk: int = 0
    joint: int = 0


class _Scale(NamedTuple):
    """columns: for one unit of time. window: the most columns in a line. style: what a box shows.

    "label": all that identifies it. "digits": as many last digits as it has room for. "blocks": its kind alone, and
    a column shows what takes most of its time.
    """

    columns: float
    window: int
    style: str

    def column(self, time: float) -> int:
        """Rounded down, so that a box n columns long has at least n; the millionth absorbs the rounding of floats."""
        return math.floor(time * self.columns + 1e-6)


def text_picture(simulation: Simulation, *, width: int, colour: bool) -> str:
    """The picture, without a heading, in lines of at most `width` characters; the last ones say what it shows.

    What is longer than a line goes on below, in windows of time, or is drawn smaller where that would be too much.
    colour: with ANSI escape sequences, which take no room.
    Raises ValueError for a width below 40, and where no action takes any time.
    """
    if width < _NARROWEST:
        raise ValueError(f"text_picture: width is {width}; expected at least {_NARROWEST} characters")
    if not simulation.makespan > 0:
        raise ValueError("text_picture: no action takes any time, so there is nothing to draw; give costs above 0")
    return "\n".join(_Picture(simulation, width, colour).lines())


class _Picture:
    def __init__(self, simulation: Simulation, width: int, colour: bool):
        schedule = simulation.schedule
        self.width, self.colour, self.makespan = width, colour, float(simulation.makespan)
        self.chunked = schedule.stages > schedule.ranks
        self.boxes = [_boxes(simulation, rank) for rank in range(schedule.ranks)]
        self.names = [f"rank {rank}" for rank in range(schedule.ranks)]
        self.peaks = [short(peak) for peak in simulation.peak_memory]
        self.unit = "microbatches" if simulation.costs.activation == 1 else "units of the costs"
        self.unnamed = False  # whether there is a box without its label
        self.left = len(self.names[-1]) + 3
        self.scale = self._choose(width - self.left - 3 - max(map(len, ["peak", *self.peaks])))

    def _choose(self, room: int) -> _Scale:
        """All of it in one window of `room` columns as telling as can be; else several windows; else smaller."""
        single, labelled = self._wanted()
        if self.colour and single * self.makespan <= room < labelled * self.makespan:
            return _Scale(single * math.floor(room / (single * self.makespan)), room, "digits")
        for columns, style in ((labelled, "label"), (single, "digits" if self.colour else "blocks")):
            whole = math.ceil(columns * self.makespan - 1e-6)
            box = max(1, math.floor(columns / single))
            window = whole if whole <= room else room // box * box or room  # boxes are cut at its end only if need be
            if whole <= room or math.ceil(whole / window) * (len(self.boxes) + 2) <= _MOST_LINES:
                return _Scale(columns, window, style)
        return _Scale(room / self.makespan, room, "blocks")

    def _wanted(self) -> tuple[float, float]:
        """Columns for one unit of time that give every box one column, and its label with a space behind.

        What is shorter than a fifth of the median box does without, rather than stretch the whole picture.
        """
        times = sorted(box.end - box.start for row in self.boxes for box in row if box.kind != "comm")
        times = [time for time in times if time > 0]
        least = times[len(times) // 2] / 5
        boxes = [box for row in self.boxes for box in row if box.kind != "comm" and box.end - box.start >= least]
        return (
            max(1 / (box.end - box.start) for box in boxes),
            max((len(self._label(box)) + 1) / (box.end - box.start) for box in boxes),
        )

    def _label(self, box: _Box) -> str:
        if self.colour:
            return str(box.microbatch)
        return f"{box.stage if self.chunked else ''}{box.kind}{box.microbatch}"

    def lines(self) -> Iterator[str]:
        last = self.scale.column(self.makespan)
        for begin in range(0, last, self.scale.window):
            end = min(begin + self.scale.window, last)
            yield f"{self._ruler(begin, end)}   peak"
            for name, row, peak in zip(self.names, self.boxes, self.peaks, strict=True):
                yield f"{name:<{self.left}}{self._row(row, begin, end)}   {peak}"
            yield ""
        yield from self._legend()

    def _ruler(self, begin: int, end: int) -> str:
        """Times, each at the column in which it begins."""
        line = f"{'time':<{self.left}}"
        for time in ticks(self.makespan, round_step(8 / self.scale.columns)):
            at = self.scale.column(time)
            if begin <= at <= end - len(short(time)):
                line = f"{line:<{self.left + at - begin}}{short(time)}"
        return f"{line:<{self.left + end - begin}}"

    def _row(self, row: list[_Box], begin: int, end: int) -> str:
        cells = [(" ", "")] * (end - begin)  # character, ANSI sequence
        pieces = self._blocks(row, begin, end) if self.scale.style == "blocks" else self._pieces(row, begin, end)
        for at, text, paint in pieces:
            cells[at - begin : at - begin + len(text)] = [(letter, paint) for letter in text]
        parts = (("".join(letter for letter, _ in same), paint) for paint, same in groupby(cells, lambda cell: cell[1]))
        return "".join(_painted(text, paint) for text, paint in parts)

    def _pieces(self, row: list[_Box], begin: int, end: int) -> Iterator[tuple[int, str, str]]:
        """(first column, text, ANSI sequence) of what each box has in the window."""
        for box in row:
            first, stop = max(self.scale.column(box.start), begin), min(self.scale.column(box.end), end)
            if first < stop:
                yield first, self._text(box, stop - first, last=stop == end), self._paint(box)

    def _text(self, box: _Box, columns: int, last: bool) -> str:
        """last: whether nothing stands behind it, so that it can do without a space at its end."""
        if box.kind == "comm":
            return (" " if self.colour else "~") * columns
        label = self._label(box)
        if self.scale.style == "digits":
            label = label[-columns:]
        elif len(label) + (not last) > columns:  # a box too short for all, or what another window has of one
            self.unnamed = True
            return f"{'-' * max(columns - 1, 1):<{columns}}"
        if self.colour:
            return f"{label:^{columns}}"
        return f"{label:<{columns - 1}}&" if box.joint == 1 and len(label) < columns else f"{label:<{columns}}"

    def _blocks(self, row: list[_Box], begin: int, end: int) -> Iterator[tuple[int, str, str]]:
        """The same for one column after the other, where idle time has the rest of each."""
        shares: list[dict[tuple[str, str], float]] = [{} for _ in range(begin, end)]
        for box in row:
            start, stop = box.start * self.scale.columns, box.end * self.scale.columns
            look = (" " if self.colour else "~" if box.kind == "comm" else box.kind[0], self._paint(box))
            for at in range(max(math.floor(start), begin), min(math.ceil(stop), end)):
                share = shares[at - begin]
                share[look] = share.get(look, 0.0) + min(stop, at + 1) - max(start, at)
        for at, share in enumerate(shares, begin):
            if share:
                letter, paint = max(share, key=share.get)
                if share[letter, paint] >= 1 - sum(share.values()):
                    yield at, letter, paint

    def _paint(self, box: _Box) -> str:
        """The ANSI sequence of a box: black on the colour of its kind, underlined in a joint step."""
        return f"\x1b[{'4;' if box.joint else ''}38;5;16;48;5;{_ANSI[box.kind][box.chunk % 2]}m" if self.colour else ""

    def _legend(self) -> Iterator[str]:
        """Entries side by side as the width allows. Colours come last, because they have no width."""
        line, length = "", 0
        for text, paint in self._entries():
            if line and length + 2 + len(text) > self.width:
                yield line
                line, length = "", 0
            if line:
                line, length = line + "  ", length + 2
            mark, space, word = text.partition(" ") if paint else ("", "", text)
            line, length = line + _painted(mark, paint) + space + word, length + len(text)
        yield line

    def _entries(self) -> Iterator[tuple[str, str]]:
        """(text, ANSI sequence of its first word)."""
        boxes = [box for row in self.boxes for box in row]
        blocks, kinds = self.scale.style == "blocks", {box.kind for box in boxes}
        for kind in (kind for kind in COMPUTES if kind in kinds):
            shown = kind[0] if blocks and not self.colour else kind
            yield f"{shown} {WORDS[kind]}", self._paint(_Box(kind, 0, 0, 0, 0))
        if "comm" in kinds:
            yield "~ exposed transfer", self._paint(_Box("comm", 0, 0, 0, 0))
        if self.colour and self.chunked:
            yield "lighter: odd chunks", ""
        if any(box.joint for box in boxes) and (self.colour or not blocks):
            yield "underlined: joint step" if self.colour else "&: joint step", ""
        if self.chunked and not self.colour and not blocks:
            yield "2F1: F of stage 2, microbatch 1", ""
        if self.scale.style == "digits":
            yield "numbers: last digits of the microbatch", ""
        if self.unnamed:
            yield "-: no room for the label", ""
        columns = self.scale.columns
        yield (
            (f"1 column: {short(1 / columns)} of time" if columns <= 1 else f"{short(columns)} columns: 1 of time"),
            "",
        )
        yield f"peak: activations in {self.unit}", ""


def _painted(text: str, paint: str) -> str:
    return f"{paint}{text}\x1b[0m" if paint else text


def _boxes(simulation: Simulation, rank: int) -> list[_Box]:
    """What the rank did, and what it was blocked by."""
    actions, boxes, joint = simulation.schedule.actions[rank], [], 0
    stages = [stage for stage, holder in enumerate(simulation.schedule.placement) if holder == rank]
    chunks = {stage: chunk for chunk, stage in enumerate(stages)}
    for (kind, stage, microbatch), start, end in zip(
        actions, simulation.starts[rank], simulation.ends[rank], strict=True
    ):
        if kind is Kind.PAIR:
            joint = 1
            continue
        boxes.append(_Box(str(kind), stage, microbatch, start, end, chunks[stage], joint))
        joint = joint + 1 if joint == 1 else 0
    return boxes + [_Box("comm", None, None, start, end) for start, end in simulation.blocked[rank]]
