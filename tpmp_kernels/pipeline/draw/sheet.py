"""A Sheet: rectangles, lines and texts in pixels, in the order of painting, y downward. svg.py and png.py write it."""

from collections.abc import Sequence
from typing import NamedTuple


class Rect(NamedTuple):
    """seam: a thin white border that keeps neighbours apart. title: what hovering shows, where that is possible."""

    x: float
    y: float
    width: float
    height: float
    fill: str
    seam: bool = False
    title: str = ""


class Line(NamedTuple):
    """Straight from point to point. fill: the colour of what the line surrounds. An empty colour paints nothing."""

    points: Sequence[tuple[float, float]]
    stroke: str
    width: float = 1.0
    fill: str = ""
    dashed: bool = False


class Text(NamedTuple):
    """y: of the baseline. anchor: whether x is the "start", "middle" or "end"."""

    x: float
    y: float
    text: str
    size: int = 12
    anchor: str = "start"
    bold: bool = False


Shape = Rect | Line | Text


class Sheet(NamedTuple):
    width: float
    height: float
    shapes: list[Shape]


def text_width(text: str, size: float, bold: bool = False) -> float:
    """At most, about, in the wider of the usual sans-serif fonts."""
    narrow = sum(letter in " .,:;()'|fijlrtI" for letter in text)
    wide = sum(letter in "mwMW%" for letter in text)
    return (0.63 * len(text) - 0.24 * narrow + 0.3 * wide) * size * (1.1 if bold else 1.0)
