"""The sheet of simulated schedules: every box in its place and in one scale, memory, table, legend."""

from itertools import pairwise

import pytest

from tpmp_kernels.pipeline.costs import Costs
from tpmp_kernels.pipeline.draw import schedule_sheet, to_svg
from tpmp_kernels.pipeline.draw.palette import COLOURS, IDLE, MEMORY, shade
from tpmp_kernels.pipeline.draw.sheet import Line, Rect, Sheet, Text
from tpmp_kernels.pipeline.lowering import lower
from tpmp_kernels.pipeline.schedules import build
from tpmp_kernels.pipeline.simulate import simulate
from tpmp_kernels.pipeline.simulation import Simulation


def simulated(name: str, ranks: int, microbatches: int, **costs) -> Simulation:
    return simulate(lower(build(name, ranks=ranks, microbatches=microbatches)), Costs(**costs))


def texts(sheet: Sheet) -> list[str]:
    return [shape.text for shape in sheet.shapes if isinstance(shape, Text)]


def panel_boxes(sheet: Sheet) -> list[list[list[Rect]]]:
    """[panel][rank]: the boxes of events by start. Rows are idle rectangles, and bands of memory are lower."""
    row_height = max(shape.height for shape in sheet.shapes if isinstance(shape, Rect))
    rows = [shape for shape in sheet.shapes if isinstance(shape, Rect) and shape[3:5] == (row_height, IDLE)]
    headings = [shape.y for shape in sheet.shapes if isinstance(shape, Text) and " stages, " in shape.text]
    hovering = [shape for shape in sheet.shapes if isinstance(shape, Rect) and shape.title]
    panels: list[list[list[Rect]]] = [[] for _ in headings]
    for row in rows:
        panel = panels[sum(y < row.y for y in headings) - 1]
        panel.append(sorted(box for box in hovering if row.y <= box.y < row.y + row.height))
    assert sum(len(row) for panel in panels for row in panel) == len(hovering), "a box in no row"
    return panels


def test_all_panels_have_every_event_in_one_scale():
    simulations = [simulated(name, 3, 6, latency=0.5) for name in ("gpipe", "1f1b", "dualpipe-v")]
    panels = panel_boxes(schedule_sheet(simulations))
    scale, left = panels[0][0][0].width, panels[0][0][0].x  # the first forward takes 1
    for simulation, rows in zip(simulations, panels, strict=True):
        for events, row in zip(simulation.events(), rows, strict=True):
            assert [(left + event.start * scale, (event.end - event.start) * scale) for event in events] == [
                (pytest.approx(box.x), pytest.approx(box.width)) for box in row
            ]
            for event, box in zip(events, row, strict=True):
                words = {"F": "forward", "BW": "backward", "B": "input gradient", "W": "weight", "comm": "transfer"}
                assert words[event.kind] in box.title
                assert event.kind == "comm" or f"stage {event.stage}, microbatch {event.microbatch}," in box.title


def test_chunks_have_shades():
    sheet = schedule_sheet([simulated("dualpipe-v", 2, 8)])
    words = {", input gradient": "B", ", weight gradient": "W", "backward, stage": "BW", "forward": "F"}
    kinds = set()
    for rank, row in enumerate(panel_boxes(sheet)[0]):
        for box in row:
            kind = next(kind for word, kind in words.items() if word in box.title)
            chunk = 0 if f"stage {rank}," in box.title else 1
            assert box.fill == shade(kind, chunk, 2)
            kinds.add((kind, chunk))
    assert len(kinds) == 8 == len({shade(*each, 2) for each in kinds})
    assert shade("F", 0, 2) == shade("F", 0, 1) == COLOURS["F"]


def test_joint_steps_have_a_frame_where_there_is_room():
    simulation = simulated("dualpipe-v", 2, 8)
    sheet = schedule_sheet([simulation])
    pairs = [
        (_left(sheet) + start * 2 * _half(sheet), (end - start) * 2 * _half(sheet))
        for actions, *times in zip(simulation.schedule.actions, simulation.starts, simulation.ends, strict=True)
        for (kind, *_), start, end in zip(actions, *times, strict=True)
        if kind == "PAIR"
    ]
    of_legend, *steps = frames(sheet)
    drawn = [(frame.points[0][0], frame.points[1][0] - frame.points[0][0]) for frame in steps]
    assert len(pairs) > 4 and drawn == [(pytest.approx(x, abs=1), pytest.approx(width, abs=2)) for x, width in pairs]
    assert of_legend.points[0][1] < steps[0].points[0][1]
    assert not frames(schedule_sheet([simulated("1f1b", 2, 8)]))
    narrow = schedule_sheet([simulated("dualpipe-v", 2, 512)])
    assert not frames(narrow) and "joint step" not in texts(narrow)


def _left(sheet: Sheet) -> float:
    return panel_boxes(sheet)[0][0][0].x


def _half(sheet: Sheet) -> float:
    """Pixels of the first forward, which takes half a unit of time where a rank has two stages."""
    return panel_boxes(sheet)[0][0][0].width


def frames(sheet: Sheet) -> list[Line]:
    """Outlines, in the order of painting: that of the legend first."""
    return [shape for shape in sheet.shapes if isinstance(shape, Line) and len(shape.points) == 5 and shape.stroke]


@pytest.mark.parametrize("name", ["1f1b", "zb-h1", "dualpipe-v"])
def test_bands_are_the_curves_of_memory(name):
    simulation = simulated(name, 4, 9, kept=0.25)
    sheet = schedule_sheet([simulation, simulated("gpipe", 4, 9)])  # which has the highest level of all: 9
    bands = [shape for shape in sheet.shapes if isinstance(shape, Line) and shape.fill == MEMORY]
    peaks = [word for word in texts(sheet) if word.startswith("peak ") and word != "peak memory"]
    first = panel_boxes(sheet)[0][0][0]
    scale = first.width / (simulation.ends[0][0] - simulation.starts[0][0])
    for rank in range(4):
        curve, points = simulation.memory(rank), bands[rank].points
        foot = points[0][1]
        drawn = [((x - first.x) / scale, (foot - y) / 15 * 9) for x, y in points]
        assert drawn[2::2] == [
            (pytest.approx(time), pytest.approx(level)) for time, level in [*curve, (simulation.makespan, 0)]
        ]
        assert all(before[0] == after[0] or before[1] == after[1] for before, after in pairwise(points)), "steps"
        assert peaks[rank] == f"peak {simulation.peak_memory[rank]:g}"


def test_the_table_has_the_figures():
    simulations = simulated("1f1b", 4, 8), simulated("1f1b", 2, 3, latency=0.5), simulated("zb-h2", 4, 8)
    words = texts(schedule_sheet(simulations))
    at = words.index("schedule")
    rows = [words[at + 8 * row : at + 8 * row + 8] for row in range(4)]
    assert rows == [
        ["schedule", "stages", "makespan", "bubble", "bubble in span", "peak memory", "transfers", "exposed transfer"],
        ["1f1b", "4", "33", "27.3%", "27.3%", "4", "48", "0.0%"],
        ["1f1b", "2", "14", "35.7%", "35.7%", "2", "6", "8.9%"],
        ["zb-h2", "4", "27", "11.1%", "0.0%", "7", "48", "0.0%"],
    ]


def test_the_legend_names_what_there_is():
    plain = texts(schedule_sheet([simulated("1f1b", 2, 4)]))
    assert plain[: plain.index("schedule")] == [
        "F forward", "BW backward", "bubble", "activations held on the rank, in microbatches"
    ]  # fmt: skip
    full = texts(schedule_sheet([simulated("dualpipe-v", 2, 8, latency=0.5, activation=3.5)], title="a sheet"))
    legend = full[: full.index("schedule")]
    assert legend == [
        "a sheet", "F forward", "B backward, input gradient", "BW backward", "W backward, weight gradient",
        "(dark to light: chunk 0 to 1 of the rank)", "joint step", "exposed transfer", "bubble",
        "activations held on the rank, in units of the costs",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["1f1b", "interleaved-1f1b", "zb-v", "dualpipe-v"])
@pytest.mark.parametrize(("costs", "font"), [({}, 9), ({"F": 100, "B": 120, "W": 80}, 7)])
def test_eight_ranks_by_32_microbatches_are_readable_and_small(name, costs, font):
    """Every number is there, in a font that can be read, within its box."""
    simulation = simulated(name, 8, 32, **costs)
    sheet = schedule_sheet([simulation])
    boxes = [box for row in panel_boxes(sheet)[0] for box in row]
    foot = max(box.y + box.height for box in boxes)
    numbers = [
        shape for shape in sheet.shapes if isinstance(shape, Text) and shape.anchor == "middle" and shape.y < foot
    ]
    written = {(round(text.x, 3), text.y // 40): text for text in numbers}  # a row is 40 pixels high
    assert len(written) == len(boxes)
    for box in boxes:
        number = written[round(box.x + box.width / 2, 3), (box.y + 20) // 40]
        assert number.text == box.title.partition("microbatch ")[2].partition(",")[0]
        assert number.size >= font and len(number.text) * 0.64 * number.size < box.width
    size = len(to_svg(sheet))
    print(f"{name}: {size / 1e3:.0f} KB")
    assert size < 300_000


def test_the_largest_case_does_without_numbers_and_hover():
    sheet = schedule_sheet([simulated("1f1b", 64, 256)])
    rects = [shape for shape in sheet.shapes if isinstance(shape, Rect)]
    assert len(rects) == 64 * 256 * 2 + 2 * 64 + 4  # boxes, rows and bands, legend
    assert not any(rect.title for rect in rects)
    assert len(to_svg(sheet)) < 3_000_000


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="nothing to draw; pass simulations"):
        schedule_sheet([])
