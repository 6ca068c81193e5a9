"""A Sheet as PNG, painted with matplotlib, which nothing else here needs: it is imported where it is used."""

from itertools import groupby
from os import PathLike

from tpmp_kernels.errors import UsageError
from tpmp_kernels.pipeline.draw.palette import INK, PAPER
from tpmp_kernels.pipeline.draw.sheet import Line, Rect, Shape, Sheet, Text

_PER_INCH = 96  # pixels of a sheet
_POINT = 72 / _PER_INCH  # one pixel in points, matplotlib's unit


def to_png(sheet: Sheet, path: str | PathLike, *, dpi: int = 150) -> None:
    """Write the sheet. dpi: 96 keeps its pixels. Raises UsageError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError(
            "expected matplotlib for a .png, it is missing; pip install matplotlib, or draw .svg"
        ) from None
    figure = Figure(figsize=(sheet.width / _PER_INCH, sheet.height / _PER_INCH), dpi=dpi, facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, sheet.width), ylim=(sheet.height, 0))
    axes.set_axis_off()
    # One artist for all neighbours that look alike, because they are slow; zorder keeps the order of painting.
    for order, (_, group) in enumerate(groupby(sheet.shapes, key=_look)):
        shapes = list(group)
        if isinstance(shapes[0], Text):
            for text in shapes:
                _write(axes, text, order)
        else:
            artist = _rectangles(shapes) if isinstance(shapes[0], Rect) else _lines(shapes)
            artist.set_zorder(order)
            axes.add_collection(artist, autolim=False)
    figure.savefig(path, format="png")


def _look(shape: Shape) -> tuple:
    match shape:
        case Rect():
            return Rect, shape.fill, shape.seam
        case Line():
            return Line, shape[1:]
        case Text():
            return (Text,)


def _rectangles(rects: list[Rect]):
    from matplotlib.collections import PolyCollection

    corners = [((x, y), (x + width, y), (x + width, y + height), (x, y + height)) for x, y, width, height, *_ in rects]
    border = {"edgecolors": PAPER, "linewidths": 0.8 * _POINT} if rects[0].seam else {"linewidths": 0}
    return PolyCollection(corners, facecolors=rects[0].fill, **border)


def _lines(lines: list[Line]):
    from matplotlib.collections import PathCollection
    from matplotlib.path import Path

    _, stroke, width, fill, dashed = lines[0]
    return PathCollection(
        [Path(line.points) for line in lines],
        facecolors=fill or "none",
        edgecolors=stroke or "none",
        linewidths=width * _POINT,
        linestyles=[(0, (3, 5)) if dashed else "solid"],
    )


def _write(axes, text: Text, order: int) -> None:
    axes.text(
        text.x,
        text.y,
        text.text,
        fontsize=text.size * _POINT,
        color=INK,
        ha={"start": "left", "middle": "center", "end": "right"}[text.anchor],
        va="baseline",
        weight="bold" if text.bold else "normal",
        parse_math=False,
        zorder=order,
    )
