"""One panel of a sheet: a row of boxes for each rank, a band of memory for each where that is known, and the axis."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tpmp_kernels.pipeline.draw.palette import COLOURS, COMPUTES, GRID, IDLE, INK, MEMORY, WORDS, chunk_numbers, shade
from tpmp_kernels.pipeline.draw.scale import round_step, short, ticks
from tpmp_kernels.pipeline.draw.sheet import Line, Rect, Shape, Text, text_width
from tpmp_kernels.pipeline.schedule import Event

LEFT = 64  # pixels, for the names of the ranks
FONT, _SMALL_FONT, _SMALLEST_FONT = 12, 10, 7
JOINT = 8  # pixels from which on a joint step has a frame; narrower ones would be all frame
_HEAD, _ROW, _GAP, _STRIP, _BAND, _BAND_GAP, _AXIS = 24, 34, 6, 5, 15, 2, 36
_DIGIT, _PADDING = 0.64, 1.5  # width of a digit in the wider of the usual fonts, in font sizes; pixels around them


class Row(NamedTuple):
    """What one rank did. joint: (start, end) of each joint step. memory: points (time, level), each level held until
    the next point."""

    events: Sequence[Event]
    joint: Sequence[tuple[float, float]] = ()
    memory: Sequence[tuple[float, float]] = ()


class Title(NamedTuple):
    """A line of text: first its name, in bold. Both may be empty."""

    name: str = ""
    facts: str = ""

    def shapes(self, y: float) -> Iterator[Text]:
        if self.name:
            yield Text(LEFT, y, self.name, FONT, bold=True)
        if self.facts:
            yield Text(LEFT + (text_width(self.name, FONT, bold=True) + 12 if self.name else 0), y, self.facts, FONT)


class Panel(NamedTuple):
    title: Title
    rows: Sequence[Row]

    def extent(self) -> tuple[float, float]:
        """First start and last end."""
        events = [event for row in self.rows for event in row.events]
        return min(event.start for event in events), max(event.end for event in events)

    def median(self, kinds: Sequence[str]) -> float:
        """The median time of these kinds; 0 where there is none of them."""
        times = sorted(event.end - event.start for row in self.rows for event in row.events if event.kind in kinds)
        return times[len(times) // 2] if times else 0.0


class Terms(NamedTuple):
    """How a sheet speaks. factor, suffix: what a time is multiplied by to be shown, and what follows it; the others
    are words in the legend and at the axis."""

    factor: float
    suffix: str
    axis: str
    blocked: str
    idle: str
    memory: str = ""

    def time(self, time: float) -> str:
        return short(time * self.factor)


class PanelDrawing:
    """scale: pixels for one unit of time. highest: the level of memory that fills a band. hover: whether boxes say what
    they are when pointed at."""

    def __init__(self, panel: Panel, terms: Terms, scale: float, *, highest: float, hover: bool):
        self.panel, self.terms, self.scale, self.highest, self.hover = panel, terms, scale, highest or 1, hover
        self.start, end = panel.extent()
        self.span = end - self.start
        numbers = [event.microbatch or 0 for row in panel.rows for event in row.events]
        self.digits = len(str(max(numbers)))
        self.font = self._font(panel.median(COMPUTES) * scale)
        self.width = self.span * scale
        self.banded = any(row.memory for row in panel.rows)
        self.rows_height = len(panel.rows) * (_ROW + _GAP)
        self.bands_height = len(panel.rows) * (_BAND + _BAND_GAP) + 4 if self.banded else 0
        self.head = _HEAD if any(panel.title) else 4
        self.height = self.head + self.rows_height + self.bands_height + _AXIS

    def shapes(self, top: float) -> Iterator[Shape]:
        """Everything, from `top` down."""
        tops = [top + self.head + rank * (_ROW + _GAP) for rank in range(len(self.panel.rows))]
        bands = top + self.head + self.rows_height + 4
        foot = top + self.head + self.rows_height + self.bands_height
        marks = self._marks()
        yield from self.panel.title.shapes(top + 12)
        for rank, y in enumerate(tops):
            yield Text(LEFT - 8, y + _ROW / 2 + 4, f"rank {rank}", FONT, "end")
            yield Rect(LEFT, y, self.width, _ROW, IDLE)
        yield from (Line([(x, tops[0] - 4), (x, foot)], GRID, 0.6, dashed=True) for _, x in marks)
        for rank, (row, y) in enumerate(zip(self.panel.rows, tops, strict=True)):
            yield from self._row(rank, row, y)
        if self.banded:
            for rank, row in enumerate(self.panel.rows):
                yield from self._band(rank, row, bands + rank * (_BAND + _BAND_GAP))
        yield from (Text(x, foot + 14, short(time), FONT, "middle") for time, x in marks)
        yield Text(LEFT, foot + 28, self.terms.axis, FONT)

    def _x(self, time: float) -> float:
        return LEFT + (time - self.start) * self.scale

    def _marks(self) -> list[tuple[float, float]]:
        """(time as shown, x) at a round step, some 90 pixels apart."""
        factor = self.terms.factor
        step = round_step(90 / self.scale * factor)
        return [(tick, self._x(self.start + tick / factor)) for tick in ticks(self.span * factor, step)]

    def _row(self, rank: int, row: Row, top: float) -> Iterator[Shape]:
        """Boxes by kind and chunk, so that one colour is one group in the file; strips over them; then numbers."""
        chunks = chunk_numbers(row.events)
        order = {kind: at for at, kind in enumerate(COLOURS)}
        events = sorted(row.events, key=lambda event: (order[event.kind], chunks.get(event.stage, 0)))
        for event in events:
            yield self._box(rank, event, top, shade(event.kind, chunks.get(event.stage, 0), len(chunks)))
        for start, end in row.joint:
            width = (end - start) * self.scale
            if width >= JOINT:
                yield frame(self._x(start) + 0.8, top + 0.8, width - 1.6, _ROW - 1.6)
        for event in events:
            if event.kind in COMPUTES and event.microbatch is not None:
                yield from self._number(event, top + _ROW / 2)

    def _box(self, rank: int, event: Event, top: float, colour: str) -> Rect:
        """White seams keep neighbours of one colour apart; a box too narrow for one would vanish in it."""
        x, width = self._x(event.start), (event.end - event.start) * self.scale
        title = self._hover(rank, event) if self.hover else ""
        if event.kind == "comm":
            return Rect(x, top + _ROW - _STRIP, width, _STRIP, COLOURS["comm"], title=title)
        return Rect(x, top, width, _ROW, colour, seam=width > 3, title=title)

    def _hover(self, rank: int, event: Event) -> str:
        what = self.terms.blocked if event.kind == "comm" else WORDS[event.kind]
        if event.stage is not None:
            what += f", stage {event.stage}"
        if event.microbatch is not None:
            what += f", microbatch {event.microbatch}"
        start, end = self.terms.time(event.start - self.start), self.terms.time(event.end - self.start)
        return f"rank {rank}: {what}, {start} to {end}{self.terms.suffix}"

    def _number(self, event: Event, middle: float) -> Iterator[Text]:
        """The microbatch, in the font of the median box or a smaller one; left out where it does not fit."""
        width, text = (event.end - event.start) * self.scale, str(event.microbatch)
        size = min(self._font(width), self.font)
        if width >= len(text) * size * _DIGIT + _PADDING:
            yield Text(self._x(event.start) + width / 2, middle + 0.36 * size, text, size, "middle")

    def _font(self, width: float) -> int:
        """The font in which every number of this panel fits a box so wide, within what can be read."""
        return int(min(max((width - _PADDING) / (self.digits * _DIGIT), _SMALLEST_FONT), FONT))

    def _band(self, rank: int, row: Row, top: float) -> Iterator[Shape]:
        foot, level = top + _BAND, 0.0
        curve = [(LEFT, foot)]
        for time, after in [*row.memory, (self.start + self.span, 0)]:
            curve += [(self._x(time), foot - _BAND * held / self.highest) for held in (level, after)]
            level = after
        peak = max((level for _, level in row.memory), default=0)
        yield Text(LEFT - 8, foot - 4, f"rank {rank}", _SMALL_FONT, "end")
        yield Rect(LEFT, top, self.width, _BAND, IDLE)
        yield Line(curve, "", fill=MEMORY)
        yield Text(LEFT + self.width + 6, foot - 4, f"peak {short(peak)}", _SMALL_FONT)


def frame(x: float, y: float, width: float, height: float) -> Line:
    """The outline that marks a joint step."""
    right, foot = x + width, y + height
    return Line([(x, y), (right, y), (right, foot), (x, foot), (x, y)], INK, 0.9)
