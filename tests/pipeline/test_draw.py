"""The timeline: every event becomes one box in its place; and what both writers, SVG and PNG, make of a sheet."""

import sys
import xml.etree.ElementTree as ET

import pytest

from tpmp_kernels.errors import UsageError
from tpmp_kernels.pipeline.costs import Costs
from tpmp_kernels.pipeline.draw import schedule_sheet, timeline_svg, to_png, to_svg
from tpmp_kernels.pipeline.draw.sheet import Line, Rect, Sheet, Text
from tpmp_kernels.pipeline.schedule import Event
from tpmp_kernels.pipeline.schedules import build
from tpmp_kernels.pipeline.simulate import simulate

SVG = "{http://www.w3.org/2000/svg}"
BAND = 15  # pixels: the height of a band of memory
EVENTS = [
    [Event("F", 0, 0, 10.000, 10.010), Event("comm", 0, 0, 10.004, 10.006), Event("BW", 0, 0, 10.030, 10.050)],
    [Event("F", 1, 0, 10.010, 10.020), Event("B", 1, 0, 10.020, 10.030), Event("W", 1, 0, 10.030, 10.040)],
]


def boxes(svg: str) -> dict[str, ET.Element]:
    """The box of each event by its hover text; what the group around it says is written into it."""
    root = ET.fromstring(svg)
    for group in root.iter(f"{SVG}g"):
        for shape in group:
            shape.attrib |= group.attrib
    found = {rect.find(f"{SVG}title"): rect for rect in root.iter(f"{SVG}rect")}
    return {title.text: rect for title, rect in found.items() if title is not None}


def texts(svg: str) -> list[str]:
    return [text.text for text in ET.fromstring(svg).iter(f"{SVG}text")]


def test_every_event_has_a_box_where_and_as_wide_as_it_was():
    svg = timeline_svg(EVENTS, title="one step")
    drawn = boxes(svg)
    assert list(drawn) == [
        "rank 0: forward, stage 0, microbatch 0, 0 to 10 ms",
        "rank 0: backward, stage 0, microbatch 0, 30 to 50 ms",
        "rank 0: blocked in communication, stage 0, microbatch 0, 4 to 6 ms",
        "rank 1: forward, stage 1, microbatch 0, 10 to 20 ms",
        "rank 1: backward, input gradient, stage 1, microbatch 0, 20 to 30 ms",
        "rank 1: backward, weight gradient, stage 1, microbatch 0, 30 to 40 ms",
    ]
    forward, backward, strip, below, *_ = drawn.values()
    scale = float(forward.get("width")) / 10
    left = float(forward.get("x"))
    ticks = [text.get("x") for text in ET.fromstring(svg).iter(f"{SVG}text") if text.text == "0"]
    rows = [rect for rect in ET.fromstring(svg).iter(f"{SVG}rect") if rect.get("height") == forward.get("height")]
    assert (rows[0].get("x"), rows[0].get("y")) == (forward.get("x"), forward.get("y")), (
        "the first event starts its row"
    )
    assert float(ticks[-1]) == pytest.approx(left, abs=0.06), "the axis starts where the first box does"
    assert float(backward.get("x")) == pytest.approx(left + 30 * scale, abs=0.02)
    assert float(backward.get("width")) == pytest.approx(20 * scale, abs=0.02)
    assert float(strip.get("height")) < float(forward.get("height")) / 3
    assert float(below.get("y")) >= float(forward.get("y")) + float(forward.get("height"))
    assert len({rect.get("fill") for rect in drawn.values()}) == 5


def test_heading_legend_axis_and_numbers():
    words = texts(timeline_svg(EVENTS, title="a < b & c"))
    assert words[:2] == ["a < b & c", "2 ranks, 50 ms, idle 40.0%"]
    assert {"F forward", "BW backward", "idle", "blocked in communication", "rank 0", "rank 1"} <= set(words)
    assert "optimizer" not in words
    assert words[-12:] == [*(str(5 * tick) for tick in range(11)), "time in ms"]
    assert words.count("0") == 1 + 5  # the axis and the five computes of microbatch 0


def test_a_number_is_left_out_where_it_does_not_fit():
    tiny = [[Event("F", 0, 17, 0.0, 0.0001), Event("F", 0, 18, 0.5, 1.0), Event("F", 0, 19, 1.0, 1.5)]]
    words = texts(timeline_svg(tiny))
    assert "17" not in words
    assert {"18", "19"} <= set(words)


def test_a_wide_step_stays_within_a_page():
    many = [[Event("F", 0, i, i, i + 1.0) for i in range(1000)]]
    assert float(ET.fromstring(timeline_svg(many)).get("width")) < 2600


def test_bad_events_are_refused():
    with pytest.raises(ValueError, match="there are no events"):
        timeline_svg([[], []])
    with pytest.raises(ValueError, match="rank 0 has an event of kind 'X'; expected F, B, BW, W, opt, comm"):
        timeline_svg([[Event("X", 0, 0, 0.0, 1.0)]])
    with pytest.raises(ValueError, match="ends before it starts"):
        timeline_svg([[Event("F", 0, 0, 1.0, 0.5)]])


def test_a_png_has_every_rectangle_in_its_colour(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    simulation = simulate(build("dualpipe-v", ranks=2, microbatches=8), Costs(latency=0.5))
    sheet = schedule_sheet([simulation], title=r"no $\frac$ of & any")
    to_png(sheet, tmp_path / "sheet.png", dpi=96)
    pixels = image.imread(tmp_path / "sheet.png")
    assert pixels.shape[:2] == (int(sheet.height), int(sheet.width))
    rects = [shape for shape in sheet.shapes if isinstance(shape, Rect) and shape.width > 4 and shape.height != BAND]
    for rect in rects:
        x, y = rect.x + rect.width - 3, rect.y + rect.height - 3  # clear of frames and of numbers
        painted = "#" + "".join(f"{round(255 * channel):02x}" for channel in pixels[int(y), int(x), :3])
        assert painted == [other.fill for other in rects if inside(other, x, y)][-1], rect
    colours = {tuple(pixel) for row in pixels for pixel in row}
    assert len({rect.fill for rect in rects}) == 11 and len(colours) > 50, "4 kinds in 2 shades, idle, memory, transfer"
    assert pixels[8:22, 64:200, :3].min() < 0.4, "the title is written"


def inside(rect: Rect, x: float, y: float) -> bool:
    return rect.x <= x <= rect.x + rect.width and rect.y <= y <= rect.y + rect.height


def test_svg_groups_lose_nothing():
    shapes = [
        Rect(0, 1, 2, 3, "#111111"), Rect(4, 5, 6.125, 7, "#111111"),
        Rect(0, 0, 1, 1, "#222222", seam=True, title="<t>"),
        Line([(0, 0), (5, 0), (5, 5), (7, 9.999)], "#333333", 0.6, dashed=True),
        Text(1, 2, "a & b", bold=True),
    ]  # fmt: skip
    root = ET.fromstring(to_svg(Sheet(20, 10, shapes)))
    assert (root.get("width"), root.get("viewBox")) == ("20", "0 0 20 10")
    paper, group, third, path, text = root
    assert [rect.attrib for rect in group] == [
        {"x": "0", "y": "1", "width": "2", "height": "3"}, {"x": "4", "y": "5", "width": "6.12", "height": "7"},
    ]  # fmt: skip
    assert (group.get("fill"), third.get("fill"), third.get("stroke")) == ("#111111", "#222222", paper.get("fill"))
    assert third[0].text == "<t>" and (text.text, text.get("font-weight")) == ("a & b", "bold")
    assert path.get("d") == "M0 0H5V5L7 10" and path.get("fill") == "none" and path.get("stroke-dasharray")


def test_png_without_matplotlib_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"expected matplotlib .* pip install matplotlib"):
        to_png(schedule_sheet([simulate(build("1f1b", ranks=2, microbatches=2))]), tmp_path / "sheet.png")
    assert not (tmp_path / "sheet.png").exists()
