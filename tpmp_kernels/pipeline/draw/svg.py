"""A Sheet as SVG. What neighbours have in common stands once, in a group: the large sheets have 100,000 boxes."""

from collections.abc import Iterator
from html import escape
from itertools import groupby

from tpmp_kernels.pipeline.draw.palette import INK, PAPER
from tpmp_kernels.pipeline.draw.sheet import Line, Rect, Shape, Sheet, Text


def to_svg(sheet: Sheet) -> str:
    """One SVG document."""
    width, height = _number(sheet.width), _number(sheet.height)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="Helvetica, Arial, sans-serif" fill="{INK}">'
    )
    paper = f'<rect width="{width}" height="{height}" fill="{PAPER}"/>'
    return "\n".join([head, paper, *_groups(sheet), "</svg>\n"])


def _groups(sheet: Sheet) -> Iterator[str]:
    for style, group in groupby(sheet.shapes, key=_style):
        shapes = list(group)
        if len(shapes) == 1:
            yield _element(shapes[0], style)
        else:
            yield f"<g{style}>"
            yield from (_element(shape) for shape in shapes)
            yield "</g>"


def _style(shape: Shape) -> str:
    match shape:
        case Rect():
            return f' fill="{shape.fill}"' + (f' stroke="{PAPER}" stroke-width=".8"' if shape.seam else "")
        case Line():
            stroke = f' stroke="{shape.stroke}" stroke-width="{_number(shape.width)}"' if shape.stroke else ""
            return f' fill="{shape.fill or "none"}"{stroke}' + (' stroke-dasharray="2 3"' if shape.dashed else "")
        case Text():
            anchor = "" if shape.anchor == "start" else f' text-anchor="{shape.anchor}"'
            weight = ' font-weight="bold"' if shape.bold else ""
            return f' font-size="{shape.size}"{anchor}{weight} pointer-events="none"'


def _element(shape: Shape, style: str = "") -> str:
    match shape:
        case Rect(x, y, width, height, title=title):
            place = f'x="{_number(x)}" y="{_number(y)}" width="{_number(width)}" height="{_number(height)}"'
            return f"<rect {place}{style}" + (f"><title>{escape(title)}</title></rect>" if title else "/>")
        case Line():
            return f'<path d="{_path(shape)}"{style}/>'
        case Text(x, y, text):
            return f'<text x="{_number(x)}" y="{_number(y)}"{style}>{escape(text)}</text>'


def _path(line: Line) -> str:
    """Horizontal and vertical parts, which is almost all there are, need one number instead of two."""
    last_x, last_y = map(_number, line.points[0])
    path = f"M{last_x} {last_y}"
    for point in line.points[1:]:
        x, y = map(_number, point)
        if y == last_y:
            path += f"H{x}"
        elif x == last_x:
            path += f"V{y}"
        else:
            path += f"L{x} {y}"
        last_x, last_y = x, y
    return path


def _number(value: float) -> str:
    """To a hundredth of a pixel."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
