"""The timeline: every event becomes one box in its place, and the document is well-formed."""

import xml.etree.ElementTree as ET

import pytest

from tpmp_kernels.pipeline.draw import timeline_svg
from tpmp_kernels.pipeline.schedule import Event

SVG = "{http://www.w3.org/2000/svg}"
EVENTS = [
    [Event("F", 0, 0, 10.000, 10.010), Event("comm", 0, 0, 10.004, 10.006), Event("BW", 0, 0, 10.030, 10.050)],
    [Event("F", 1, 0, 10.010, 10.020), Event("B", 1, 0, 10.020, 10.030), Event("W", 1, 0, 10.030, 10.040)],
]


def boxes(svg: str) -> dict[str, ET.Element]:
    """The box of each event by its hover text."""
    found = {rect.find(f"{SVG}title"): rect for rect in ET.fromstring(svg).iter(f"{SVG}rect")}
    return {title.text: rect for title, rect in found.items() if title is not None}


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
    assert float(ticks[-1]) == pytest.approx(left, abs=0.06), "the axis starts where the first box does"
    assert float(backward.get("x")) == pytest.approx(left + 30 * scale, abs=0.02)
    assert float(backward.get("width")) == pytest.approx(20 * scale, abs=0.02)
    assert float(strip.get("height")) < float(forward.get("height")) / 3
    assert float(below.get("y")) >= float(forward.get("y")) + float(forward.get("height"))
    assert len({rect.get("fill") for rect in drawn.values()}) == 5


def texts(svg: str) -> list[str]:
    return ["".join(text.itertext()) for text in ET.fromstring(svg).iter(f"{SVG}text")]


def test_heading_legend_axis_and_numbers():
    words = texts(timeline_svg(EVENTS, title="a < b & c"))
    assert words[0] == "a < b & c2 ranks, 50 ms, idle 40.0%"
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
