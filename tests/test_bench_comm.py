"""`tpmp bench comm` and what the comm suite shares with it: only right results are timed, and no process is left."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from tpmp_kernels import __main__ as command
from tpmp_kernels.bench import Provenance, Timing, comm
from tpmp_kernels.bench import command as bench_command
from tpmp_kernels.bench.comm_options import CALLS, SIZES, parse
from tpmp_kernels.errors import UsageError

WHERE = Provenance("cpu-test-2core", 1, "0123456789", "2026-01-02T03:04:05Z", {"torch": "2.13.0"})
CONTENDERS = ["gloo", "tpmp", "tpmp on comm.empty", "memcpy"]


# ---- measuring


@pytest.mark.parametrize(("size", "call"), [(3, name) for name in comm.CALLS] + [(2, comm.MESSAGE), (3, comm.MESSAGE)])
def test_every_contender_is_timed_and_right(ranks, size, call):
    rows = comm.measure(ranks(size), call, 1024, WHERE, quick=True)
    assert [row.contender for row in rows] == CONTENDERS
    assert all(row.median > 0 and row.shape == "1 KiB" and row.case.startswith(call) for row in rows)


def wrong_on(contender: str) -> None:
    """An all_reduce that adds 1 to an element on rank 1, for one contender; in a process that ends with the error."""

    def run(output, input, group):
        dist.all_reduce(output, group=group)
        if dist.get_rank() == 1 and (group is dist.group.WORLD) == (contender == "gloo"):
            output[7] += 1

    comm.CALLS["all_reduce"] = replace(comm.CALLS["all_reduce"], run=run)
    comm.time_call("all_reduce", 1024, True)


@pytest.mark.parametrize("contender", ["gloo", "tpmp"])
def test_contender_that_is_wrong_is_not_timed(ranks, contender):
    with pytest.raises(AssertionError, match=f"{contender} is wrong on rank 1: 1 of 256 elements"):
        ranks(2).run(wrong_on, contender)  # a pool that saw a failure is made anew


def test_backend_that_cannot_run_is_rows_with_the_reason():
    class Pool:
        size = 2

        def run(self, function, *args, timeout):
            assert (function, args) == (comm.time_call, ("all_reduce", 4096, False))
            return [({"gloo": Timing((t,)), "memcpy": Timing((0.5,))}, "no shared memory") for t in (1.0, 2.0)]

    rows = {row.contender: row for row in comm.measure(Pool(), "all_reduce", 4096, WHERE)}
    assert rows["gloo"].median == 2 and rows["gloo"].ceiling == 0.25
    assert {rows[name].note for name in CONTENDERS[1:3]} == {"no shared memory"}


def test_bursts_are_long_where_calls_are_short_and_sums_stay_finite():
    assert comm.counts(4 << 10, 2) == {"rounds": 15, "iterations": 50, "warmup": 2}
    assert comm.counts(64 << 20, 2) == {"rounds": 9, "iterations": 3, "warmup": 2}
    largest = comm.data(0, 1000).max().item()
    for ranks in (2, 3, 8, 64):
        assert largest * float(ranks) ** comm.counts(4 << 10, ranks)["iterations"] < 1e38


def test_names_on_the_command_line_are_those_of_calls():
    assert tuple(CALLS.values()) == comm.NAMES


# ---- the command


def test_defaults():
    options = parse([])
    assert (options.ranks, options.calls, options.quick) == (2, list(comm.NAMES), False)
    assert [comm.show_size(nbytes).replace(" ", "") for nbytes in options.sizes] == SIZES.split(",")
    quick = parse(["--quick", "--calls", "send,all_reduce,send"])
    assert (quick.sizes, quick.calls) == ([64 << 10, 1 << 20], [comm.MESSAGE, "all_reduce"])
    assert parse(["--sizes", "256, 4k,1MiB,512B"]).sizes == [256, 4096, 1 << 20, 512]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "expected what to measure (comm), got nothing; such as tpmp bench comm --quick"),
        (["gemm"], "expected what to measure (comm), got 'gemm'; such as tpmp bench comm --quick"),
        (["comm", "4"], "expected options only, got '4'; tpmp bench comm --help lists them"),
        (["comm", "--rank", "4"], "unknown option '--rank'; the nearest known one is '--ranks'"),
        (["comm", "--ranks", "1"], "--ranks: expected a whole number from 2 to 64, got '1'; such as 2"),
        (["comm", "--ranks", "two"], "--ranks: expected a whole number from 2 to 64, got 'two'; such as 2"),
        (["comm", "--ranks"], "--ranks: expected a value, got nothing; tpmp bench comm --help shows one for"),
        (["comm", "--quick=1"], "--quick: expected no value, got '1'; leave it out"),
        (["comm", "--sizes", "4XB"], "--sizes: expected sizes such as 4KiB,1MiB, got '4XB'; units are B, KiB, MiB"),
        (["comm", "--sizes", "4KiB,"], "--sizes: expected sizes such as 4KiB,1MiB, got '4KiB,'; remove the empty one"),
        (["comm", "--sizes", "100"], "--sizes: expected a multiple of 256 bytes (an element for each of 64 ranks) up"),
        (["comm", "--sizes", "2GiB"], "--sizes: expected a multiple of 256 bytes (an element for each of 64 ranks) up"),
        (["comm", "--calls", "alreduce"], "--calls: unknown call 'alreduce'; the nearest known one is 'all_reduce' of"),
    ],
)
def test_bad_input_is_one_sentence(argv, sentence, capsys):
    assert command.main(["bench", *argv]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"tpmp bench: {sentence}") and err.count("\n") == 1 and out == ""


def test_more_memory_than_there_is_is_refused_before_it_is_used(monkeypatch):
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 1 << 20, "SC_PAGE_SIZE": 4096}.get)
    assert parse(["--ranks", "8", "--sizes", "4KiB,64MiB"]).ranks == 8
    with pytest.raises(UsageError, match=r"9 ranks need about 4\.5 GiB for tensors of 64 MiB, this machine has 4;"):
        parse(["--ranks", "9", "--sizes", "4KiB,64MiB"])


def start(*options: str) -> subprocess.Popen:
    argv = [sys.executable, "-m", "tpmp_kernels", "bench", "comm", *options]
    return subprocess.Popen(
        argv,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # ignored where make test & runs
    )


def session(leader: int) -> list[int]:
    """Processes, zombies aside, of the session that `leader` started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, number = stat.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(number) == leader and state != "Z":
            found.append(int(stat.parent.name))
    return found


def test_prints_one_aligned_table():
    process = start("--quick", "--calls", "all_reduce,send", "--sizes", "256B")
    out, err = process.communicate(timeout=100)
    assert (process.returncode, err) == (0, "")
    heading, columns, *lines = out.splitlines()
    assert re.fullmatch(r"2 ranks on \S+, torch \S+, \d{4}-\d\d-\d\d", heading)
    start_of = columns.index("contender")
    assert [line[start_of:].split("  ")[0] for line in lines] == CONTENDERS * 2
    assert [line.split("  ")[0] for line in lines[::4]] == ["all_reduce 2 ranks", comm.MESSAGE]


def test_rank_that_failed_is_said_in_one_sentence_below_its_traceback(monkeypatch, capsys):
    def fails(argv, progress):
        progress("after 3 of 5 measurements")
        raise AssertionError("rank 1: Traceback ... gloo is wrong")

    monkeypatch.setattr(bench_command, "run", fails)
    assert command.main(["bench", "comm"]) == 1
    assert capsys.readouterr().err == (
        "rank 1: Traceback ... gloo is wrong\n"
        "tpmp bench: a rank failed after 3 of 5 measurements; its traceback is above\n"
    )


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.full)]
)
def test_interrupted_it_leaves_no_process(signum, code):
    process = start("--sizes", "64MiB")
    process.stdout.readline()
    give_up = time.monotonic() + 60
    while len(session(process.pid)) < 5:  # itself, the fork server, the resource tracker, two ranks
        assert time.monotonic() < give_up and process.poll() is None
        time.sleep(0.01)
    if signum == signal.SIGINT:
        os.killpg(process.pid, signum)  # as a terminal does
    else:
        process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    how = "interrupted" if signum == signal.SIGINT else "ended by SIGTERM"
    assert process.returncode == code
    assert re.fullmatch(rf"tpmp bench: {how} after \d of 6 measurements; every rank was stopped\n", err)
    while left := session(process.pid):
        assert time.monotonic() < give_up, f"processes {left} are left"
        time.sleep(0.01)
