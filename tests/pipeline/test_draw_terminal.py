"""The picture in characters: exact for small schedules, and within its width and readable for large ones."""

import re

import pytest

from tpmp_kernels.pipeline.costs import Costs
from tpmp_kernels.pipeline.draw import text_picture
from tpmp_kernels.pipeline.lowering import lower
from tpmp_kernels.pipeline.schedules import build
from tpmp_kernels.pipeline.simulate import simulate

ESCAPE = re.compile("\x1b\\[[0-9;]*m")
WIDTHS = (40, 57, 80, 200)


def picture(name: str, ranks: int, microbatches: int, *, width: int = 120, colour: bool = False, **costs) -> str:
    simulation = simulate(lower(build(name, ranks=ranks, microbatches=microbatches)), Costs(**costs))
    return text_picture(simulation, width=width, colour=colour)


def rows(text: str) -> list[str]:
    """What is drawn of the ranks, without names and peaks; windows of one rank joined."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        if match := re.match(r"(rank \d+) {3}(.*) {3}[0-9.]+$", line):
            name, drawn = match.groups()
            found[name] = found.get(name, "") + drawn
    return list(found.values())


def test_one_window_is_the_figure_of_the_docstrings():
    assert picture("1f1b", 3, 4) == (
        "time     0              5              10             15          peak\n"
        "rank 0   F0 F1 F2             BW0   F3 BW1      BW2      BW3      3\n"
        "rank 1      F0 F1       BW0   F2 BW1   F3 BW2      BW3            2\n"
        "rank 2         F0 BW0   F1 BW1   F2 BW2   F3 BW3                  1\n"
        "\n"
        "F forward  BW backward  3 columns: 1 of time  peak: activations in microbatches"
    )


def test_joint_steps_stages_and_windows():
    assert picture("dualpipe-v", 2, 4, width=70) == (
        "time     0       1       2       3       4       5       6      peak\n"
        "rank 0   0F0 0F1 0F2 3F0 3B0 3W0 3F1 0F3&3BW1        3F2&0BW0   2.5\n"
        "rank 1       1F0 2F0 1F1 2F1 1F2 2BW0    2F2&1BW0    1F3&2BW1   2.5\n"
        "\n"
        "time         7       8       9       10      11      12         peak\n"
        "rank 0   --- 3BW2        3F3&0BW1    3BW3    0B2 0W2 0B3 0W3    2.5\n"
        "rank 1   --- 2F3&1BW1    2BW2    1BW2        2B3 1B3 2W3 1W3    2.5\n"
        "\n"
        "F forward  B backward, input gradient  BW backward\n"
        "W backward, weight gradient  &: joint step\n"
        "2F1: F of stage 2, microbatch 1  -: no room for the label\n"
        "8 columns: 1 of time  peak: activations in microbatches"
    )


def test_transfers_and_units():
    assert picture("1f1b", 2, 3, width=40, latency=1, activation=2.5) == (
        "time     0              5           peak\n"
        "rank 0   F0 F1          ~~~BW0      5\n"
        "rank 1      ~~~F0 BW0   F1 BW1      2.5\n"
        "\n"
        "time           10             15    peak\n"
        "rank 0   F2 BW1         ~~~BW2      5\n"
        "rank 1      ~~~F2 BW2   ~~~         2.5\n"
        "\n"
        "F forward  BW backward\n"
        "~ exposed transfer  3 columns: 1 of time\n"
        "peak: activations in units of the costs"
    )


def test_what_is_much_shorter_does_not_stretch_the_picture():
    assert rows(picture("zb-h1", 1, 2, F=10, B=10, W=1)) == ["F0 B0 F1 B1 "]
    assert rows(picture("zb-h1", 1, 2, F=10, B=10, W=3)) == ["F0        B0        W0 F1        B1        W1 "]


def test_blocks_show_what_takes_most_of_the_time():
    drawn = rows(picture("gpipe", 2, 200, width=40))
    assert [row.strip() for row in drawn] == [re.sub("[^FB]", "", row) for row in drawn], "no bubble but at the ends"
    assert [len(row) for row in drawn] == [24, 24]
    assert all(abs(row.count("F") - 8) <= 1 and abs(row.count("B") - 16) <= 1 for row in drawn)
    idle, busy = rows(picture("1f1b", 2, 800, width=40, F=[1, 10], BW=[1, 12]))
    assert idle.strip() == "" and busy == "B" * 24


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved-1f1b", "zb-h2", "dualpipe-v"])
def test_every_width_is_kept(name, colour):
    for ranks, microbatches, costs in ((2, 3, {}), (8, 32, {"latency": 0.3}), (12, 5, {"F": 1.7, "B": 0.9, "W": 0.05})):
        for width in WIDTHS:
            text = picture(name, ranks, microbatches, width=width, colour=colour, **costs)
            lines = ESCAPE.sub("", text).splitlines()
            assert max(map(len, lines)) <= width
            assert len(lines) <= 110
            assert all(f"rank {rank} " in text for rank in range(ranks))
            assert ("\x1b" in text) is colour


@pytest.mark.parametrize("name", ["1f1b", "interleaved-1f1b", "zb-h1", "zb-v", "dualpipe-v"])
def test_every_action_is_named_in_order(name):
    schedule = build(name, ranks=4, microbatches=12)
    text = text_picture(simulate(schedule), width=200, colour=False)
    stage = r"\d+" if schedule.stages > 4 else ""
    for row, actions in zip(rows(text), schedule.actions, strict=True):
        named = re.findall(rf"{stage}(?:BW|F|B|W)\d+", row)
        expected = [f"{s if stage else ''}{kind}{microbatch}" for kind, s, microbatch in actions if kind != "PAIR"]
        assert list(dict.fromkeys(named)) == expected  # a box in two windows may have its label in both


def test_colours_tell_kind_chunk_and_joint_step():
    text = picture("dualpipe-v", 2, 4, colour=True)
    first = next(line for line in text.splitlines() if line.startswith("rank 0"))
    cells = re.findall("\x1b\\[([0-9;]*)m([^\x1b]*)\x1b", first)
    forward, lighter = "38;5;16;48;5;75", "38;5;16;48;5;153"
    assert cells[:2] == [(forward, "0 1 2 "), (lighter, "0 ")]
    joint = [(paint, drawn) for paint, drawn in cells if paint.startswith("4;")]
    assert joint[0] == (f"4;{forward}", "3 ") and joint[1] == ("4;38;5;16;48;5;223", " 1  ")
    assert len({paint.removeprefix("4;") for paint, _ in cells}) == 8
    assert "lighter: odd chunks" in text and "underlined: joint step" in text


def test_eight_by_32_fits_one_line_of_200_columns_in_colour():
    text = ESCAPE.sub("", picture("1f1b", 8, 32, width=200, colour=True))
    assert text.count("rank 0") == 1 and "numbers: last digits of the microbatch" in text
    last = text.splitlines()[8]
    assert last.startswith("rank 7          00 11 22 33 44 55 66 77 88 99 010111212")


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="width is 39; expected at least 40"):
        picture("1f1b", 2, 2, width=39)
    with pytest.raises(ValueError, match=r"no action takes any time.*give costs above 0"):
        picture("1f1b", 2, 2, F=0, B=0, W=0)
