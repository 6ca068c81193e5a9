"""`tpmp schedule`, called as the shell calls it: what it says, shows and writes, and one sentence for bad input."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from schedule_command import in_a_folder_of_its_own, refused, shown  # noqa: F401

from tpmp_kernels import __main__ as tpmp
from tpmp_kernels.pipeline.costs import Costs
from tpmp_kernels.pipeline.draw import chrome_trace, schedule_sheet, text_picture, to_svg
from tpmp_kernels.pipeline.files import load, save
from tpmp_kernels.pipeline.lowering import lower
from tpmp_kernels.pipeline.schedules import SCHEDULES, build
from tpmp_kernels.pipeline.simulate import simulate
from tpmp_kernels.pipeline.validate import validate

README = (Path(__file__).parents[2] / "README.md").read_text()
SIZES = ["--pp", "4", "--microbatches", "8"]


def as_json(capsys, *argv: str) -> dict:
    return json.loads(shown(capsys, *argv, "--json"))


# What it shows ---------------------------------------------------------------------------------------------------


def test_figures_of_one_schedule(capsys):
    """1F1B in closed form, of p = 4 and m = 8: bubble (p-1)(F+B+W), memory p - s."""
    out = shown(capsys, "1f1b", *SIZES)
    assert out.startswith("1f1b: 4 ranks, 4 stages, 8 microbatches\n")
    assert out.endswith(
        "\n\n"
        "makespan          33\n"
        "bubble            9, 27.3% of the makespan\n"
        "bubble in span    9, 27.3% of the longest span (a rank's first start to its last end)\n"
        "peak memory       4 3 2 1 by rank, in microbatches of activations\n"
        "transfers         48\n"
        "exposed transfer  0 on every rank\n"
        "proved: 64 actions, 48 messages, free of deadlock under any buffering, peak live within the closed form\n"
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_shown_and_its_numbers_are_the_simulators(name, capsys):
    plan = lower(build(name, ranks=4, microbatches=8))
    simulation, report = simulate(plan.schedule), validate(plan)
    assert "proved: " in shown(capsys, name, *SIZES)
    out = as_json(capsys, name, *SIZES)
    (fields,) = out["schedules"]
    for each in ("makespan", "bubble", "bubble_ratio", "span", "span_bubble", "messages"):
        assert fields[each] == getattr(simulation, each)
    for each in ("busy", "exposed", "peak_memory"):
        assert fields[each] == list(getattr(simulation, each))
    assert fields["proved"] == {
        "actions": report.actions,
        "messages": report.messages,
        "peak_live": list(report.peak_live),
        "closed_form": True,
    }
    assert fields["placement"] == list(plan.schedule.placement) and fields["name"] == fields["title"] == name
    computes = [[each for each in rank if each.kind != "comm"] for rank in simulation.events()]
    assert sorted(map(sorted, fields["timeline"])) == sorted(sorted(map(list, rank)) for rank in computes)


def test_stages_is_another_name_of_pp(capsys):
    assert shown(capsys, "gpipe", "--stages", "4", "--microbatches", "8") == shown(capsys, "gpipe", *SIZES)
    assert shown(capsys, *SIZES, "gpipe", "--stages=4") == shown(capsys, "gpipe", *SIZES)


def test_costs(capsys):
    text = "F=100,B=120,W=80,BW=190,pair=0.9,latency=3,bandwidth=10,message=5,activation=2,kept=0.5"
    costs = Costs(F=100, B=120, W=80, BW=190, pair=0.9, latency=3, bandwidth=10, message=5, activation=2, kept=0.5)
    out = as_json(capsys, "1f1b", *SIZES, "--costs", text)
    simulation = simulate(build("1f1b", ranks=4, microbatches=8), costs)
    (fields,) = out["schedules"]
    assert fields["makespan"] == simulation.makespan and fields["exposed"] == list(simulation.exposed)
    assert max(fields["exposed"]) > 0 and fields["peak_memory"] == [8, 6, 4, 2]
    assert out["costs"] == {
        **{"F": 100, "B": 120, "W": 80, "BW": 190, "pair": 0.9, "early_release": True, "latency": 3},
        **{"bandwidth": 10, "message": 5, "activation": 2, "kept": 0.5},
    }
    assert as_json(capsys, "1f1b", *SIZES, "--costs", "bandwidth=inf")["costs"]["bandwidth"] is None
    assert "in the unit of activation" in shown(capsys, "1f1b", *SIZES, "--costs", text)


def test_costs_reach_the_schedules_that_are_searched_for(capsys):
    costs = Costs(F=100, B=200, W=50)
    searched = build("zb-v", ranks=4, microbatches=8, costs=costs)
    assert searched != build("zb-v", ranks=4, microbatches=8)
    shown(capsys, "zb-v", *SIZES, "--costs", "F=100,B=200,W=50", "--save", "order.json")
    assert load("order.json") == searched


def test_chunks_are_for_the_schedules_with_a_choice(capsys):
    out = as_json(capsys, "interleaved-1f1b", *SIZES, "--chunks", "3", "--compare", "1f1b,zb-v")
    assert [each["stages"] for each in out["schedules"]] == [12, 4, 8]
    assert as_json(capsys, "interleaved-1f1b", *SIZES)["schedules"][0]["stages"] == 8
    assert as_json(capsys, "dualpipe-v", *SIZES, "--chunks", "2")["schedules"][0]["stages"] == 8


def test_several_in_one_table(capsys):
    out = shown(capsys, "1f1b", *SIZES, "--compare", "gpipe, forward-only,1f1b,gpipe")
    assert out.count("proved: ") == 3
    assert out.endswith(
        "\n\n"
        "schedule      stages  makespan  bubble  bubble in span  peak memory  transfers  exposed transfer\n"
        "1f1b               4        33   27.3%           27.3%            4         48              0.0%\n"
        "gpipe              4        33   27.3%           27.3%            8         48              0.0%\n"
        "forward-only       4        11   27.3%            0.0%            1         24              0.0%\n"
    )
    both = as_json(capsys, "1f1b", *SIZES, "--compare", "gpipe")["schedules"]
    assert [each["name"] for each in both] == ["1f1b", "gpipe"]


def test_exposed_transfer_in_the_table_is_the_mean_of_the_ranks(capsys):
    simulation = simulate(build("1f1b", ranks=4, microbatches=8), Costs(latency=0.25))
    mean = sum(simulation.exposed) / 4
    assert 0 < mean < max(simulation.exposed)
    row = shown(capsys, "1f1b", *SIZES, "--compare", "gpipe", "--costs", "latency=0.25").splitlines()[-2]
    assert row.split()[0] == "1f1b" and row.split()[-1] == f"{mean / simulation.makespan:.1%}"


def test_list_has_every_schedule_in_one_line(capsys):
    lines = shown(capsys, "--list").splitlines()
    assert [line.split()[0] for line in lines] == list(SCHEDULES)
    assert all(len(line.split()) > 4 and len(line) < 160 for line in lines)
    assert lines[0] == "gpipe              GPipe (Huang et al., 2019): all forwards, then all backwards."


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as caught:
        tpmp.main(["schedule", "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    options = ("--pp", "--stages", "--microbatches", "--chunks", "--costs", "--compare", "--draw", "--trace", "--save")
    for option in (*options, "--json", "--width", "--no-color", "--list"):
        assert option in out
    assert "tpmp schedule NAME" in out
    assert tpmp.main(["--help"]) == 0 and "tpmp schedule" in capsys.readouterr().out


def test_width_and_colour(capsys, monkeypatch):
    def widest(*argv: str) -> int:
        out = shown(capsys, "1f1b", *SIZES, *argv)
        assert "\x1b" not in out, "no terminal, no colour"
        return max(map(len, out.partition("makespan")[0].splitlines()))

    picture = text_picture(simulate(build("1f1b", ranks=4, microbatches=8)), width=90, colour=False)
    assert f"\n\n{picture}\n\nmakespan" in shown(capsys, "1f1b", *SIZES, "--width", "90")
    assert widest("--width", "60") <= 60 < widest("--width", "110") <= 110
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "\x1b[" in shown(capsys, "1f1b", *SIZES)
    assert "\x1b" not in shown(capsys, "1f1b", *SIZES, "--no-color")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in shown(capsys, "1f1b", *SIZES)


# What it writes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".json", ".csv"])
def test_saved_schedules_are_shown_again(suffix, capsys):
    path = f"order{suffix}"
    assert shown(capsys, "1f1b", *SIZES, "--save", path).endswith(f"\n\n{path} written\n")
    assert load(path).actions == build("1f1b", ranks=4, microbatches=8).actions
    out = shown(capsys, path)
    assert out.startswith(f"{path}: 4 ranks") and "peak live activations 4 3 2 1 by rank" in out
    assert shown(capsys, f"./{path}", *SIZES, "--chunks", "1").replace("./", "") == out, "sizes may be given, and agree"
    compared = as_json(capsys, path, "--compare", "gpipe")["schedules"]
    assert [(each["title"], each["microbatches"]) for each in compared] == [(path, 8), ("gpipe", 8)]
    assert as_json(capsys, "gpipe", "--compare", path, *SIZES)["schedules"] == compared[::-1]


def test_pictures_and_trace(capsys):
    out = shown(capsys, "1f1b", *SIZES, "--compare", "gpipe", "--draw", "out.svg", "--trace", "trace.json")
    assert out.endswith("\n\nout.svg written\ntrace.json written\n")
    svg = Path("out.svg").read_text()
    assert svg.startswith("<svg") and "1f1b" in svg and "gpipe" in svg
    assert to_svg(schedule_sheet([simulate(build(each, ranks=4, microbatches=8)) for each in ("1f1b", "gpipe")])) == svg
    assert json.loads(Path("trace.json").read_text()) == chrome_trace(simulate(build("1f1b", ranks=4, microbatches=8)))
    assert sorted(os.listdir()) == ["out.svg", "trace.json"]
    assert json.loads(shown(capsys, "gpipe", *SIZES, "--draw", "out.svg", "--json")), "nothing but JSON"
    assert "1f1b" not in Path("out.svg").read_text()


def test_png(capsys):
    pytest.importorskip("matplotlib")
    shown(capsys, "1f1b", *SIZES, "--draw", "out.PNG")
    assert Path("out.PNG").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


# What it refuses -------------------------------------------------------------------------------------------------

BAD = [
    ("", "expected a schedule, got nothing; 1f1b is one, and tpmp schedule --list shows them"),
    ("1f1", "unknown schedule '1f1'; the nearest known one is '1f1b' of gpipe, 1f1b, "),
    ("GPipe SIZES", "unknown schedule 'GPipe'; the nearest known one is 'gpipe' of"),
    ("GPIPE SIZES", "unknown schedule 'GPIPE'; the nearest known one is 'gpipe' of"),
    ("'' SIZES", "unknown schedule ''; the nearest known one is "),
    ("1f1b", "expected --pp, got nothing; such as tpmp schedule 1f1b --pp 4 --microbatches 8"),
    ("1f1b --pp 4", "expected --microbatches, got nothing; such as"),
    ("1f1b --pp", "--pp/--stages: expected a value, got nothing; tpmp schedule --help shows one for each option"),
    ("1f1b --pp -3 --microbatches 8", "--pp/--stages: expected a whole number from 1 to 100,000, got '-3'; such as"),
    ("1f1b --pp 0 --microbatches 8", "--pp/--stages: expected a whole number from 1 to 100,000, got '0'; such as"),
    ("1f1b --pp 4 --microbatches 2.5", "--microbatches: expected a whole number from 1 to 100,000, got '2.5'"),
    (f"1f1b --pp {'9' * 100} --microbatches 2", "--pp/--stages: expected a whole number from 1 to 100,000, got '99"),
    ("1f1b --pp 4000 --microbatches 4000", "1f1b: expected at most 500,000 forwards (ranks x chunks x microbatches)"),
    ("1f1b --pp 4 --stages 8", "--pp/--stages: expected it once, got 4 and 8; leave one out"),
    ("1f1b SIZES --chunks 2", "schedule 1f1b: chunks is 2; it has 1 on each rank, leave chunks out"),
    ("dualpipe-v SIZES --chunks 3", "schedule dualpipe-v: chunks is 3; it has 2 on each rank, leave chunks out"),
    ("interleaved-1f1b SIZES --chunks 0", "--chunks: expected a whole number from 1 to 1,000, got '0'; such as 2"),
    ("1f1b SIZES --microbatch 8", "unknown option '--microbatch'; the nearest known one is '--microbatches'"),
    ("1f1b SIZES --colour=no", "unknown option '--colour'; the nearest known one is '--no-color'"),
    ("1f1b SIZES -p 4", "unknown option '-p'; the nearest known one is '--pp'"),
    ("1f1b gpipe SIZES", "expected one schedule, got '1f1b' and 'gpipe'; use --compare to show several"),
    ("1f1b SIZES --json=yes", "--json: expected no value, got 'yes'; leave it out"),
    (
        "1f1b SIZES --costs f=1",
        "--costs: unknown cost 'f'; the nearest known one is 'F' of F, B, W, BW, pair, latency, ",
    ),
    ("1f1b SIZES --costs bandwith=1", "--costs: unknown cost 'bandwith'; the nearest known one is 'bandwidth' of F"),
    ("1f1b SIZES --costs ''", "--costs: unknown cost ''; the nearest known one is"),
    ("1f1b SIZES --costs F=1,F=2", "--costs: expected F once, got it again as 'F=2'; leave one out"),
    ("1f1b SIZES --costs F", "--costs: expected F=NUMBER from 1e-09 to 1e9, got 'F'; such as F=100,B=120,W=80"),
    ("1f1b SIZES --costs F=0", "--costs: expected F=NUMBER from 1e-09 to 1e9, got 'F=0'"),
    ("1f1b SIZES --costs B=-1", "--costs: expected B=NUMBER from 0 to 1e9, got 'B=-1'"),
    ("1f1b SIZES --costs W=nan", "--costs: expected W=NUMBER from 0 to 1e9, got 'W=nan'"),
    ("1f1b SIZES --costs latency=inf", "--costs: expected latency=NUMBER from 0 to 1e9, got 'latency=inf'"),
    ("1f1b SIZES --costs kept=2", "--costs: kept is 2.0; expected a share from 0 to 1"),
    ("1f1b SIZES --costs bandwidth=0", "--costs: bandwidth is 0.0; expected more than 0"),
    (
        "1f1b SIZES --compare gpipe,",
        "--compare: expected schedules such as 1f1b,zb-v, got 'gpipe,'; remove the empty one",
    ),
    ("1f1b SIZES --compare gpip", "unknown schedule 'gpip'; the nearest known one is 'gpipe'"),
    ("1f1b SIZES --width wide", "--width: expected a whole number from 40 to 10,000, got 'wide'; such as 120"),
    ("1f1b SIZES --width 39", "--width: expected a whole number from 40 to 10,000, got '39'; such as 120"),
    ("1f1b SIZES --draw out.pdf", "--draw: expected a file that ends in .svg or .png, got 'out.pdf'; rename it"),
    (
        "1f1b SIZES --draw no/out.svg",
        "--draw: expected a file in a folder that exists, got 'no/out.svg'; make the folder",
    ),
    ("1f1b SIZES --trace out.svg", "--trace: expected a file that ends in .json, got 'out.svg'; rename it"),
    ("1f1b SIZES --trace no/t.json", "--trace: expected a file in a folder that exists, got 'no/t.json'; make the"),
    ("1f1b SIZES --save out.txt", "--save: expected a file that ends in .json or .csv, got 'out.txt'; rename it"),
    ("1f1b SIZES --save no/o.csv", "--save: expected a file in a folder that exists, got 'no/o.csv'; make the"),
    (
        "1f1b SIZES --save folder.csv",
        "--save: expected a file that can be written, got 'folder.csv'; give another path",
    ),
    (
        "none.csv",
        "'none.csv': cannot be read (No such file or directory); expected a file with a schedule, check the path",
    ),
    ("order.txt SIZES", "'order.txt': expected a file that ends in .json or .csv, got '.txt'; rename it"),
    ("order.csv --pp 3", "--pp: expected 2, which 'order.csv' has, got 3; leave it out"),
    ("order.csv --microbatches 3", "--microbatches: expected 2, which 'order.csv' has, got 3; leave it out"),
    ("order.csv --chunks 3", "--chunks: 'order.csv' has 2 stages on 2 ranks, got 3 on each; leave --chunks out"),
    ("1f1b SIZES --compare order.csv", "--pp: expected 2, which 'order.csv' has, got 4; leave it out"),
    ("bad.csv", "'bad.csv': row 1 (rank 0), cell 1: expected an action such as 0F3"),
    (
        "wrong.csv",
        "'wrong.csv' is no schedule that can run: wrong: rank 1 computes BW of stage 1, microbatch 1 a second",
    ),
    ("stuck.csv", "'stuck.csv' is no schedule that can run: stuck deadlocks: rank 0 "),
    ("folder.csv", "'folder.csv': cannot be read (Is a directory)"),
]


@pytest.fixture
def files(tmp_path):
    save(build("1f1b", ranks=2, microbatches=2), tmp_path / "order.csv")
    (tmp_path / "bad.csv").write_text("x")
    (tmp_path / "wrong.csv").write_text("0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1,1B1\n")
    (tmp_path / "stuck.csv").write_text("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n")
    (tmp_path / "folder.csv").mkdir()


@pytest.mark.parametrize("line, sentence", BAD, ids=[line[:40] for line, _ in BAD])
def test_bad_input_is_one_sentence(line, sentence, capsys, files):
    before = sorted(os.listdir())
    assert refused(capsys, *shlex.split(line.replace("SIZES", " ".join(SIZES)))).startswith(sentence)
    assert sorted(os.listdir()) == before


def test_nothing_is_computed_for_a_file_that_cannot_be_written(capsys, monkeypatch):
    from tpmp_kernels.pipeline import command

    monkeypatch.setattr(command, "lower", lambda schedule: pytest.fail("computed"))
    assert "make the folder" in refused(capsys, "1f1b", *SIZES, "--draw", "no/out.svg")


def test_png_without_matplotlib(capsys, monkeypatch):
    from tpmp_kernels.pipeline import options

    monkeypatch.setattr(options.importlib.util, "find_spec", lambda name: None)
    sentence = refused(capsys, "1f1b", *SIZES, "--draw", "out.png")
    assert sentence == "--draw: expected matplotlib for 'out.png', got none; install it, or draw an .svg"


def test_a_full_disk_is_one_sentence(capsys, monkeypatch):
    from tpmp_kernels.pipeline import files

    def full(source, target):
        raise OSError(28, "No space left on device", str(source), None, str(target))

    monkeypatch.setattr(files.os, "replace", full)
    sentence = refused(capsys, "1f1b", *SIZES, "--save", "order.csv")
    assert sentence == "'order.csv' cannot be written (No space left on device); give another path"
    assert os.listdir() == [], "and leaves nothing"


# What the README says of it --------------------------------------------------------------------------------------


def test_the_readme_quotes_what_it_prints(capsys, monkeypatch):
    """Whole, or the end of it. The commands without output follow each other, as there."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(Path(__file__).parents[2])
    quotes = re.findall(r"^```\n\$ tpmp schedule ([^\n]*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    assert len(quotes) == 2
    for arguments, quoted in quotes:
        assert shown(capsys, *arguments.split()).endswith(quoted)
    commands = re.findall(r"^tpmp schedule (.*)$", README, re.MULTILINE)
    assert len(commands) == 4 and all(shown(capsys, *arguments.split()) for arguments in commands)


# As a process ----------------------------------------------------------------------------------------------------


def test_it_is_quick_and_loads_no_torch():
    code = (
        "import sys; from tpmp_kernels.__main__ import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'tyro', 'numpy', 'rich', 'matplotlib'} & set(sys.modules); "
        "assert not heavy, heavy; sys.exit(code)"
    )
    command, took = [sys.executable, "-c", code, "schedule", "1f1b", *SIZES, "--draw", "out.svg"], []
    for _ in range(3):
        begin = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        took.append(time.perf_counter() - begin)
        assert done.returncode == 0, done.stderr
        assert "proved: 64 actions" in done.stdout
    print(f"tpmp schedule 1f1b --pp 4 --microbatches 8: {min(took):.2f} s")
    assert min(took) < 2


def test_a_reader_that_has_seen_enough_is_no_error():
    """More output than a pipe holds, and nobody reads it."""
    command = [sys.executable, "-m", "tpmp_kernels", "schedule", "1f1b", "--pp", "8", "--microbatches", "999", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_characters_that_a_terminal_does_not_have_are_no_error():
    save(build("1f1b", ranks=4, microbatches=8), "réglé.csv")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "tpmp_kernels", "schedule", "réglé.csv"]
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.returncode == 0 and done.stdout.startswith(b"r?gl?.csv: 4 ranks"), done.stderr
