"""A whole sheet: title, legend and table, and below them panels, all in one scale of time so that lengths compare."""

from collections.abc import Iterator, Sequence

from tpmp_kernels.pipeline.draw.palette import COLOURS, COMPUTES, IDLE, MEMORY, WORDS, chunk_numbers, shade
from tpmp_kernels.pipeline.draw.panel import FONT, JOINT, LEFT, Panel, PanelDrawing, Terms, Title, frame
from tpmp_kernels.pipeline.draw.sheet import Rect, Shape, Sheet, Text, text_width

_RIGHT, _LINE, _PATCH = 64, 18, 12
_NARROWEST = 900
_DIGIT = 7  # pixels
_MOST_HOVERS = 20_000  # in larger pictures the hover texts would be most of a file of many megabytes
_FRAMED = "framed"  # in place of a colour: a patch with a frame alone


def lay_out(
    panels: Sequence[Panel], terms: Terms, *, title: Title, table: Sequence[Sequence[str]] = (), widest: float
) -> Sheet:
    """The sheet. table: rows of cells, the head first. widest: pixels that the longest row may take."""
    span = max(end - start for start, end in (panel.extent() for panel in panels)) or 1e-9
    width = _plot_width(panels, span, widest)
    scale, full, y = width / span, LEFT + width + _RIGHT, 8.0
    shapes: list[Shape] = []
    if any(title):
        shapes += title.shapes(y + 12)
        y += 24
    legend, y = _placed(_legend(panels, terms, scale), y, full)
    shapes += legend
    for at, cells in enumerate(table):
        shapes += _cells(cells, table, y + 14, bold=at == 0)
        y += _LINE
    rows = [row for panel in panels for row in panel.rows]
    highest = max((level for row in rows for _, level in row.memory), default=0)
    hover = sum(len(row.events) for row in rows) <= _MOST_HOVERS
    for panel in panels:
        drawing = PanelDrawing(panel, terms, scale, highest=highest, hover=hover)
        shapes += drawing.shapes(y + 12)
        y += 12 + drawing.height
    return Sheet(full, y + 6, shapes)


def _plot_width(panels: Sequence[Panel], span: float, widest: float) -> float:
    """Wide enough for two digits and room in the median box of a forward, in the panel where these are narrowest."""
    medians = [median for panel in panels if (median := panel.median(["F"])) > 0]
    wanted = 3 * _DIGIT * span / min(medians) if medians else 0.0
    return min(max(wanted, _NARROWEST), widest)


def _legend(panels: Sequence[Panel], terms: Terms, scale: float) -> list[tuple[str, list[str]]]:
    """(word, its colours) for everything on the sheet. A compute has all shades of the chunks."""
    rows = [row for panel in panels for row in panel.rows]
    kinds = {event.kind for row in rows for event in row.events}
    chunks = max(1, *(len(chunk_numbers(row.events)) for row in rows))
    entries = [
        (f"{kind} {WORDS[kind]}", [shade(kind, chunk, chunks) for chunk in range(chunks)])
        for kind in COMPUTES
        if kind in kinds
    ]
    if chunks > 1:
        entries.append((f"(dark to light: chunk 0 to {chunks - 1} of the rank)", []))
    if any((end - start) * scale >= JOINT for row in rows for start, end in row.joint):
        entries.append(("joint step", [_FRAMED]))
    entries += [
        (word, [COLOURS[kind]]) for kind, word in (("opt", WORDS["opt"]), ("comm", terms.blocked)) if kind in kinds
    ]
    entries.append((terms.idle, [IDLE]))
    if any(row.memory for row in rows):
        entries.append((terms.memory, [MEMORY]))
    return entries


def _placed(entries: list[tuple[str, list[str]]], y: float, full: float) -> tuple[list[Shape], float]:
    """The legend's entries side by side as the width allows, and where they end."""
    shapes: list[Shape] = []
    x = LEFT
    for word, colours in entries:
        patches = _PATCH * len(colours) + (5 if colours else 0)
        width = patches + text_width(word, FONT)
        if x + width > full and x > LEFT:
            x, y = LEFT, y + _LINE
        for at, colour in enumerate(colours):
            place = (x + _PATCH * at, y + 2, _PATCH, _PATCH)
            shapes.append(frame(*place) if colour == _FRAMED else Rect(*place, colour))
        shapes.append(Text(x + patches, y + 12, word, FONT))
        x += width + 18
    return shapes, y + _LINE + 4


def _cells(cells: Sequence[str], table: Sequence[Sequence[str]], y: float, bold: bool) -> Iterator[Text]:
    """One row of the table: the first column to the left, the numbers to the right."""
    x = LEFT
    for column, cell in enumerate(cells):
        width = max(text_width(row[column], FONT, bold=at == 0) for at, row in enumerate(table))
        yield Text(x + (width if column else 0), y, cell, FONT, "end" if column else "start", bold)
        x += width + 24
