"""The field's picture of a pipeline: one row for each rank, one box for each action, time to the right, as SVG."""

import math
from collections.abc import Iterator, Sequence
from html import escape

from tpmp_kernels.pipeline.schedule import Event

_COLOURS = {"F": "#6ea8e0", "B": "#4fb8a5", "BW": "#f2a65a", "W": "#8cc66d", "opt": "#b5a4d6", "comm": "#d9534f"}
_WORDS = {
    "F": "forward",
    "B": "backward, input gradient",
    "BW": "backward",
    "W": "backward, weight gradient",
    "opt": "optimizer",
    "comm": "blocked in communication",
}
_IDLE, _INK, _GRID = "#eceff1", "#263238", "#b0bec5"
_LEFT, _TOP, _RIGHT, _ROW, _GAP, _FONT = 64, 58, 20, 34, 6, 12
_DIGIT = 0.6 * _FONT  # width of one digit


def timeline_svg(events: Sequence[Sequence[Event]], *, title: str = "") -> str:
    """One SVG document. `events[rank]`: what the rank did, in seconds of one clock; the earliest start becomes 0.

    Boxes are F, B, W, BW and opt with the microbatch in them where it fits; background is idle time, the bubble.
    Blocked time ("comm") is a strip along the foot of the row, since it may lie within a box. Hovering names each.
    Raises ValueError where there is nothing to draw, for an unknown kind, and for an end before its start.
    """
    _check(events)
    start = min(event.start for row in events for event in row)
    span = max(event.end for row in events for event in row) - start or 1e-9
    width = _plot_width(events, span)
    scale = width / span
    height = _TOP + len(events) * (_ROW + _GAP)
    body = [
        *_head(events, title, span),
        *(line for rank, row in enumerate(events) for line in _row(rank, row, start, scale, width)),
        *_axis(span, scale, height),
    ]
    total_width, total_height = _LEFT + width + _RIGHT, height + 34
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total_width:.0f} {total_height}" '
            f'width="{total_width:.0f}" height="{total_height}" '
            f'font-family="Helvetica, Arial, sans-serif" font-size="{_FONT}" fill="{_INK}">',
            f'<rect width="{total_width:.0f}" height="{total_height}" fill="white"/>',
            *body,
            "</svg>\n",
        ]
    )


def _check(events: Sequence[Sequence[Event]]) -> None:
    if not any(events):
        raise ValueError("timeline_svg: there are no events; pass one list of Event for each rank, not all empty")
    for rank, row in enumerate(events):
        for event in row:
            if event.kind not in _COLOURS:
                raise ValueError(
                    f"timeline_svg: rank {rank} has an event of kind {event.kind!r}; expected {', '.join(_COLOURS)}"
                )
            if event.end < event.start:
                raise ValueError(f"timeline_svg: rank {rank} has {event}, which ends before it starts")


def _plot_width(events: Sequence[Sequence[Event]], span: float) -> float:
    """Wide enough for two digits in a median box of a forward, within what a page shows."""
    forwards = sorted(event.end - event.start for row in events for event in row if event.kind == "F")
    median = forwards[len(forwards) // 2] if forwards else 0.0
    wanted = 2.9 * _DIGIT * span / median if median > 0 else 0.0
    return min(max(wanted, 900.0), 2400.0)


def _head(events: Sequence[Sequence[Event]], title: str, span: float) -> Iterator[str]:
    busy = sum(event.end - event.start for row in events for event in row if event.kind != "comm")
    idle = max(0.0, 1 - busy / (span * len(events)))
    facts = f"{len(events)} ranks, {_milliseconds(span)} ms, idle {idle:.1%}"
    heading = f'<tspan font-weight="bold">{escape(title)}</tspan><tspan dx="12">{facts}</tspan>'
    yield f'<text x="{_LEFT}" y="20">{heading}</text>'
    kinds = {event.kind for row in events for event in row}
    x = _LEFT
    for kind, word in [(kind, word) for kind, word in _WORDS.items() if kind in kinds] + [("", "idle")]:
        text = f"{kind} {word}" if kind in ("F", "B", "BW", "W") else word
        colour = _COLOURS.get(kind, _IDLE)
        yield f'<rect x="{x:.1f}" y="34" width="12" height="12" fill="{colour}"/>'
        yield f'<text x="{x + 17:.1f}" y="44">{text}</text>'
        x += 38 + 6.6 * len(text)


def _row(rank: int, row: Sequence[Event], start: float, scale: float, width: float) -> Iterator[str]:
    top = _TOP + rank * (_ROW + _GAP)
    yield f'<text x="{_LEFT - 8}" y="{top + _ROW / 2 + 4}" text-anchor="end">rank {rank}</text>'
    yield f'<rect x="{_LEFT}" y="{top}" width="{width:.1f}" height="{_ROW}" fill="{_IDLE}"/>'
    for event in sorted(row, key=lambda event: event.kind == "comm"):  # strips are drawn over boxes
        x, w = _LEFT + (event.start - start) * scale, (event.end - event.start) * scale
        y, h = (top + _ROW - 5, 5) if event.kind == "comm" else (top, _ROW)
        # White seams keep neighbours of one kind apart; a box too narrow for one would vanish in it.
        seam = ' stroke="white" stroke-width="0.8"' if w > 3 and event.kind != "comm" else ""
        yield (
            f'<rect x="{x:.2f}" y="{y}" width="{w:.2f}" height="{h}" fill="{_COLOURS[event.kind]}"{seam}>'
            f"<title>{_hover(rank, event, start)}</title></rect>"
        )
        text = "" if event.microbatch is None or event.kind in ("comm", "opt") else str(event.microbatch)
        if text and w >= len(text) * _DIGIT + 3:
            yield (
                f'<text x="{x + w / 2:.2f}" y="{top + _ROW / 2 + 4}" text-anchor="middle" '
                f'pointer-events="none">{text}</text>'
            )


def _hover(rank: int, event: Event, start: float) -> str:
    what = _WORDS[event.kind]
    if event.stage is not None:
        what += f", stage {event.stage}"
    if event.microbatch is not None:
        what += f", microbatch {event.microbatch}"
    begin, end = _milliseconds(event.start - start), _milliseconds(event.end - start)
    return f"rank {rank}: {what}, {begin} to {end} ms"


def _axis(span: float, scale: float, height: float) -> Iterator[str]:
    """Ticks at a round number of milliseconds, 1, 2 or 5 times a power of ten, about 90 pixels apart."""
    raw = 90 / scale
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    for tick in range(math.floor(span / step + 1e-9) + 1):
        x = _LEFT + tick * step * scale
        yield f'<path d="M{x:.1f} {_TOP - 4}V{height}" stroke="{_GRID}" stroke-width="0.6" stroke-dasharray="2 3"/>'
        yield f'<text x="{x:.1f}" y="{height + 14}" text-anchor="middle">{_milliseconds(tick * step)}</text>'
    yield f'<text x="{_LEFT}" y="{height + 28}">time in ms</text>'


def _milliseconds(seconds: float) -> str:
    """Four significant digits, without an exponent for all that a training step can last."""
    return f"{seconds * 1e3:.4g}" if seconds < 10 else f"{seconds * 1e3:.0f}"
