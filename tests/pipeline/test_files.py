"""Schedules in files: what is written is what is read, torch and this package load each other's CSV, and no file does
more than become a Schedule or a ScheduleError."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as torch_schedules

from tpmp_kernels.errors import ScheduleError
from tpmp_kernels.pipeline.files import from_csv, from_json, load, replacing, save, to_csv, to_json
from tpmp_kernels.pipeline.schedule import Action, Kind, Schedule
from tpmp_kernels.pipeline.schedules import SCHEDULES, build
from tpmp_kernels.pipeline.validate import validate

F, B, W, BW, PAIR = Kind.F, Kind.B, Kind.W, Kind.BW, Kind.PAIR


def orders(*rows: list[tuple]) -> tuple[tuple[Action, ...], ...]:
    return tuple(tuple(Action(*each) for each in row) for row in rows)


# Two ranks in a V with every kind, and a joint step with a whole backward; one rank with one that is split.
WITH_ALL_KINDS = Schedule("all-kinds", (0, 1, 1, 0), 2, orders(
    [(F, 0, 0), (F, 0, 1), (F, 3, 0), (PAIR, 3, 1), (F, 3, 1), (BW, 3, 0), (B, 3, 1), (W, 3, 1),
     (BW, 0, 0), (B, 0, 1), (W, 0, 1)],
    [(F, 1, 0), (F, 2, 0), (F, 1, 1), (F, 2, 1), (B, 2, 0), (BW, 1, 0), (W, 2, 0), (BW, 2, 1), (BW, 1, 1)],
))  # fmt: skip
JOINT_WITH_B = Schedule("joint", (0,), 2, orders(
    [(F, 0, 0), (PAIR, 0, 1), (F, 0, 1), (B, 0, 0), (W, 0, 0), (B, 0, 1), (W, 0, 1)],
))  # fmt: skip


@st.composite
def schedules(draw) -> Schedule:
    """Every named schedule in small sizes, and the two above."""
    name = draw(st.sampled_from([*SCHEDULES, "all-kinds", "joint"]))
    if name not in SCHEDULES:
        return WITH_ALL_KINDS if name == "all-kinds" else JOINT_WITH_B
    ranks, microbatches = draw(st.integers(1, 6)), draw(st.integers(1, 14))
    try:
        return build(name, ranks=ranks, microbatches=microbatches)
    except ValueError:  # a size that this schedule refuses
        return build("1f1b", ranks=ranks, microbatches=microbatches)


@settings(deadline=None, max_examples=80)
@given(schedules())
def test_what_is_written_is_what_is_read(schedule):
    assert from_json(to_json(schedule)) == schedule
    assert from_csv(to_csv(schedule), schedule.name) == schedule


@pytest.mark.parametrize("schedule", [WITH_ALL_KINDS, JOINT_WITH_B], ids=lambda each: each.name)
def test_the_examples_are_schedules(schedule):
    validate(schedule)


def test_the_words_of_both_formats():
    assert json.loads(to_json(WITH_ALL_KINDS)) == {
        "name": "all-kinds",
        "placement": [0, 1, 1, 0],
        "microbatches": 2,
        "backward": True,
        "actions": ["0F0 0F1 3F0 3F1+3BW0 3B1 3W1 0BW0 0B1 0W1", "1F0 2F0 1F1 2F1 2B0 1BW0 2W0 2BW1 1BW1"],
    }
    assert to_csv(WITH_ALL_KINDS).splitlines() == [
        "0F0,0F1,3F0,(3F1;3B0)OVERLAP_F_B,3I1,3W1,0B0,0I1,0W1",
        "1F0,2F0,1F1,2F1,2I0,1B0,2W0,2B1,1B1",
    ]


def test_idle_and_lowered_cells_are_left_out():
    """A byte order mark, blanks and blank lines at the end, as editors and spreadsheets leave them."""
    text = "0UNSHARD, 0F0 ,,0SEND_F0,0RECV_B0,0B0,0RESHARD,0REDUCE_GRAD\n,1RECV_F0,1F0,1B0,1SEND_B0\n\n\n"
    assert from_csv(text, "1f1b") == build("1f1b", ranks=2, microbatches=1)


def test_files_by_suffix(tmp_path):
    for name in ("order.json", "order.csv", "ORDER.JSON"):
        save(WITH_ALL_KINDS, tmp_path / name)
        loaded = load(tmp_path / name)
        assert loaded.actions == WITH_ALL_KINDS.actions and loaded.placement == WITH_ALL_KINDS.placement
        assert loaded.name == ("order" if name == "order.csv" else "all-kinds")
    (tmp_path / "order.csv").write_bytes(b"\xef\xbb\xbf" + to_csv(WITH_ALL_KINDS).encode())
    assert load(str(tmp_path / "order.csv")).actions == WITH_ALL_KINDS.actions
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ORDER.JSON", "order.csv", "order.json"]


def test_a_file_that_cannot_be_written_whole_stays_as_it_was(tmp_path):
    save(WITH_ALL_KINDS, tmp_path / "order.json")
    lone = Schedule("lone", (0,), 1, ((Action(PAIR, 0, 0), Action(F, 0, 0), Action(W, 0, 0)),))
    idle = Schedule("idle", (0,), 1, ((Action(F, 0, 0),), ()), backward=False)
    with pytest.raises(ScheduleError, match="rank 0 has PAIR of stage 0, microbatch 0 followed by F of stage 0"):
        save(lone, tmp_path / "order.json")
    with pytest.raises(ScheduleError, match="idle: rank 1 computes nothing, which CSV cannot say; use JSON"):
        save(idle, tmp_path / "idle.csv")
    with pytest.raises(ScheduleError, match=r"expected a file that ends in .json or .csv, got '.toml'"):
        save(idle, tmp_path / "idle.toml")
    assert load(tmp_path / "order.json") == WITH_ALL_KINDS and from_json(to_json(idle)) == idle
    assert [path.name for path in tmp_path.iterdir()] == ["order.json"]


def test_a_write_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "out.svg") as path:
        path.write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


# torch's own files -----------------------------------------------------------------------------------------------


def torch_schedule(name: str, ranks: int, chunks: int, microbatches: int):
    """A schedule of torch.distributed.pipelining; of a stage, its constructor looks at these attributes alone."""
    sizes = {"num_stages": ranks * chunks, "group_size": ranks, "group_rank": 0, "has_backward": True}
    stages = [SimpleNamespace(stage_index=i * ranks, submod=torch.nn.Identity(), **sizes) for i in range(chunks)]
    return getattr(torch_schedules, name)(stages, microbatches, loss_fn=torch.nn.functional.mse_loss)


TORCH = [
    ("ScheduleInterleaved1F1B", 2),
    ("ScheduleInterleaved1F1B", 3),
    ("ScheduleInterleavedZeroBubble", 2),
    ("ScheduleZBVZeroBubble", 2),
    ("ScheduleDualPipeV", 2),
]


@pytest.mark.parametrize("form", ["compute_only", "compute_comms"])
@pytest.mark.parametrize("ranks, microbatches", [(2, 4), (4, 8), (8, 32)])
@pytest.mark.parametrize("name, chunks", TORCH)
def test_what_torch_writes_is_proved_here(name, chunks, ranks, microbatches, form, tmp_path):
    theirs = torch_schedule(name, ranks, chunks, microbatches)
    theirs._dump_csv(tmp_path / "order.csv", format=form)
    ours = load(tmp_path / "order.csv")
    report = validate(ours)
    sends = [a for order in theirs.pipeline_order_with_comms.values() for a in order if "SEND" in str(a)]
    assert report.messages == len(sends)
    assert ours.placement == tuple(theirs.stage_index_to_group_rank[stage] for stage in range(ranks * chunks))
    assert ours.microbatches == microbatches
    assert (PAIR in {action.kind for action in ours.actions[0]}) == (name == "ScheduleDualPipeV")
    assert [cells(row) for row in to_csv(ours).splitlines()] == [
        [str(action) for action in theirs.pipeline_order[rank] if action is not None] for rank in range(ranks)
    ]


def cells(row: str) -> list[str]:
    """Each as torch reads and writes it."""
    return [str(torch_schedules._Action.from_str(cell)) for cell in row.split(",")]


# Torch refuses a split backward in a joint step at this place, and forwards alone; its cells it reads.
@settings(deadline=None, max_examples=40)
@given(schedules())
def test_torch_reads_every_cell(schedule):
    rows = to_csv(schedule).splitlines()
    assert [",".join(cells(row)) for row in rows] == rows


@pytest.mark.parametrize("name", sorted(set(SCHEDULES) - {"forward-only"}))
def test_what_is_written_here_torch_loads(name, tmp_path):
    """Into its runtime, whose own checks and lowering then pass."""
    ours = build(name, ranks=4, microbatches=8)
    save(ours, tmp_path / "order.csv")
    theirs = torch_schedule("ScheduleInterleaved1F1B", 4, ours.stages // 4, 8)
    theirs._load_csv(tmp_path / "order.csv")
    assert theirs.stage_index_to_group_rank == dict(enumerate(ours.placement))
    theirs._dump_csv(tmp_path / "lowered.csv")
    back = load(tmp_path / "lowered.csv")
    assert (back.actions, back.placement, back.microbatches) == (ours.actions, ours.placement, ours.microbatches)


# Bad files -------------------------------------------------------------------------------------------------------

GOOD = json.loads(to_json(build("1f1b", ranks=2, microbatches=1)))
BAD_JSON = [
    ("", "no JSON (Expecting value: line 1 column 1 (char 0)); expected a schedule as `to_json` writes it"),
    ("[" * 100_000, "no JSON ("),
    ("1" * 5_000, "no JSON ("),
    ("[1]", "expected an object with the fields name, placement, microbatches, backward, actions, got [1]; see"),
    ({**GOOD, "run": "rm"}, "expected an object with the fields name, placement, microbatches, backward, actions, got"),
    ({**GOOD, "name": "a\x1b[2J"}, "name: expected a printable name, got 'a\\x1b[2J'; correct it"),
    ({**GOOD, "name": ""}, "name: expected a printable name, got ''"),
    ({**GOOD, "placement": [0, 1.0]}, "placement: expected a list with the rank of each stage, got [0, 1.0]"),
    ({**GOOD, "microbatches": True}, "microbatches: expected a whole number from 1 on, got True"),
    ({**GOOD, "microbatches": 10**12}, "nobody computes F of stage 0, microbatch 1; expected one for each of 2 stages"),
    ({**GOOD, "backward": 1}, "backward: expected true or false, got 1"),
    ({**GOOD, "actions": "0F0"}, "actions: expected a list with one text of actions for each rank, got '0F0'"),
    ({**GOOD, "actions": ["0F0 0X0", ""]}, "actions of rank 0: expected words such as 0F3, 2BW0 (stage, F, B, W or BW"),
    ({**GOOD, "actions": ["", "0F0+0W0"]}, "actions of rank 1: expected words such as"),
    ({**GOOD, "actions": ["0W0+0B0", ""]}, "actions of rank 0: expected words such as"),
    ({**GOOD, "actions": ["0F0+0B0+0F1", ""]}, "actions of rank 0: expected words such as"),
    ({**GOOD, "actions": ["0F\N{ARABIC-INDIC DIGIT ONE}", ""]}, "actions of rank 0: expected words such as"),
    ({**GOOD, "actions": ["0F" + "9" * 5000, ""]}, "actions of rank 0: expected words such as"),
]
BAD_CSV = [
    ("", "the file is empty; expected a row for each rank with cells such as 0F3"),
    ("\r\n\r\n", "the file is empty"),
    ("0F0\n1F0,1X0", "row 2 (rank 1), cell 2: expected an action such as 0F3, 2I0, 2B0, 2W0 (stage, kind, microbatch)"),
    ("rank,action\n0,0F0", "row 1 (rank 0), cell 1: expected an action such as"),
    ("0F0x", "row 1 (rank 0), cell 1: expected an action such as"),
    ("(0F0)OVERLAP_F_B", "row 1 (rank 0), cell 1: expected an action such as"),
    ("(0F1;0W0)OVERLAP_F_B", "row 1 (rank 0), cell 1: expected an action such as"),
    ("(0B0;0F1)OVERLAP_F_B", "row 1 (rank 0), cell 1: expected an action such as"),
    ("\x00\x01\x02", "row 1 (rank 0), cell 1: expected an action such as"),
    ("0F9999999999", "row 1 (rank 0), cell 1: expected an action such as"),
    ("x" * 200_000, "row 1: no CSV (field larger than field limit (131072)); expected cells such as 0F3"),
    ("0F0\n,1F0,,0B0", "row 2 (rank 1), cell 4: '0B0' is of stage 0, which rank 0 computes too; expected every stage"),
    ("0F0\n\n1F0", "row 2 (rank 1): expected actions, got none; remove the row"),
    ("0F0\n2F0", "nobody computes stage 1, but there is a stage 2; expected stages numbered from 0 without a gap"),
    ("0F0,999999999F0", "nobody computes stage 1, but there is a stage 999999999"),
    ("0F0,0F999999999", "nobody computes F of stage 0, microbatch 1; expected one for each of 1 stages and 1000000000"),
]


@pytest.mark.parametrize("text, sentence", BAD_JSON)
def test_bad_json_is_one_sentence(text, sentence):
    with pytest.raises(ScheduleError) as caught:
        from_json(text if isinstance(text, str) else json.dumps(text))
    assert str(caught.value).startswith(sentence) and "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("text, sentence", BAD_CSV)
def test_bad_csv_is_one_sentence(text, sentence):
    with pytest.raises(ScheduleError) as caught:
        from_csv(text, "order")
    assert str(caught.value).startswith(sentence) and "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_files_that_are_none_are_one_sentence_with_the_file(tmp_path):
    files = {
        "none.csv": (None, "cannot be read (No such file or directory); expected a file with a schedule"),
        "folder.json": ("", "cannot be read (Is a directory)"),
        "order.toml": (b"", "expected a file that ends in .json or .csv, got '.toml'; rename it"),
        "order": (b"", "expected a file that ends in .json or .csv, got ''"),
        "garbage.csv": (b"0F0,\xff\xfe", "byte 4 is no UTF-8 text; expected a schedule as `save` writes it"),
        "empty.csv": (b"", "the file is empty"),
        "bad.json": (b"{}", "expected an object with the fields name, "),
        "bad\tname.csv": (b"0F0", "expected a printable name for the schedule, got 'bad\\tname'; rename the file"),
        "nul\0.csv": (None, "cannot be read (embedded null byte)"),
    }
    for name, (content, sentence) in files.items():
        path = tmp_path / name
        if content == "":
            path.mkdir()
        elif content is not None:
            path.write_bytes(content)
        with pytest.raises(ScheduleError) as caught:
            load(path)
        assert str(caught.value).startswith(f"{str(path)!r}: {sentence}"), caught.value


# Any text --------------------------------------------------------------------------------------------------------

numbers = st.one_of(st.integers(0, 3), st.integers(0, 10**12), st.text("0123456789x ", max_size=3)).map(str)
letters = st.sampled_from(["F", "B", "W", "BW", "I", "PAIR", "SEND_F", "UNSHARD", "f", ""])
words = st.builds("{}{}{}".format, numbers, letters, numbers)
joints = st.builds("{}{}{}{}{}".format, st.sampled_from(["(", ""]), words, st.sampled_from([";", "+", ""]), words,
                   st.sampled_from([")OVERLAP_F_B", ")", ""]))  # fmt: skip
rows = st.lists(st.lists(st.one_of(words, joints, st.just(""), st.text(max_size=5)), max_size=5), max_size=4)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 10**12), st.floats(), st.text(max_size=5), words, joints),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["name", "actions", ""]), inner),
    max_leaves=8,
)
objects = st.builds(lambda fields: json.dumps({**GOOD, **fields}), st.dictionaries(st.sampled_from(list(GOOD)), values))


def is_proved_or_refused(read, *args) -> None:
    try:
        validate(read(*args))
    except ScheduleError as error:
        assert "\n" not in str(error)


@settings(deadline=None, max_examples=150)
@given(st.one_of(st.text(), rows.map(lambda rows: "\n".join(",".join(row) for row in rows))))
@example("0F0\r0F1")
@example('"0F0\n",')
def test_any_csv_is_a_schedule_or_a_schedule_error(text):
    is_proved_or_refused(from_csv, text, "any")


@settings(deadline=None, max_examples=150)
@given(st.one_of(st.text(), values.map(json.dumps), objects))
@example('"\ud800"')
def test_any_json_is_a_schedule_or_a_schedule_error(text):
    is_proved_or_refused(from_json, text)


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=60), st.sampled_from(["order.csv", "order.json"]))
def test_any_bytes_are_a_schedule_or_a_schedule_error(tmp_path_factory, content, name):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    is_proved_or_refused(load, path)


def test_large_files_are_fast():
    schedule = build("1f1b", ranks=64, microbatches=1024)
    for write, read in ((to_json, from_json), (to_csv, lambda text: from_csv(text, "1f1b"))):
        begin = time.perf_counter()
        text = write(schedule)
        middle = time.perf_counter()
        assert read(text) == schedule
        done = time.perf_counter()
        print(f"{write.__name__} of 131,072 actions {middle - begin:.2f} s, back {done - middle:.2f} s")
        assert done - begin < 5
