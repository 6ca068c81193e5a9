"""The launcher, with real processes: every way a run can end, what it says about it, and that nothing stays behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from tpmp_kernels.training import launch as module
from tpmp_kernels.training.slate import Report, Slate

SCRIPT = Path(__file__).with_name("launch_script.py")


class Run:
    """The script in a process group of its own, with its processes, temporary files and shared memory in view."""

    def __init__(self, folder: Path, *arguments: str, command: tuple[str, ...] = (sys.executable,), **environment: str):
        self.mark = f"TPMP_TEST={uuid.uuid4()}"
        self.temp, self.log = folder / "temp", folder / "stderr"
        self.temp.mkdir()
        name, value = self.mark.split("=")
        given = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "GLOO_SOCKET_IFNAME")}
        self.process = subprocess.Popen(
            [*command, str(SCRIPT), *arguments],
            env={**given, name: value, "TMPDIR": str(self.temp), "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
            start_new_session=True,
        )

    def ranks(self) -> dict[int, int]:
        """Pids by rank, as soon as all four are up."""
        wait_for(lambda: len(re.findall(r"^up \d \d+$", self.log.read_text(), re.M)) == 4, 40)
        return {int(r): int(pid) for r, pid in re.findall(r"^up (\d) (\d+)$", self.log.read_text(), re.M)}

    def said(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if not line.startswith("up ")]

    def pids(self) -> set[int]:
        return {int(p.parent.name) for p in Path("/proc").glob("[0-9]*/environ") if self.mark in text(p)}

    def children(self) -> set[int]:
        return self.pids() - {self.process.pid}

    def segments(self) -> set[str]:
        """Files under /dev/shm that any process of the run has mapped."""
        return {name for pid in self.pids() for name in re.findall(r"/dev/shm/\S+", text(Path(f"/proc/{pid}/maps")))}

    def left_behind(self, segments: set[str]) -> list:
        return [*self.pids(), *self.temp.iterdir(), *(name for name in segments if os.path.exists(name))]


def text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def wait_for(condition, seconds: float) -> float:
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "still not so"
        time.sleep(0.01)
    return time.monotonic() - start


@pytest.fixture
def started(tmp_path):
    runs = []

    def start(*arguments, **options) -> Run:
        runs.append(Run(tmp_path, *arguments, **options))
        return runs[-1]

    yield start
    for run in runs:
        for pid in run.pids():
            os.kill(pid, signal.SIGKILL)
        run.process.wait()
        run.process.stdout.close()


def test_every_end_is_told_of_the_right_rank(started):
    """One launcher process, one launch after the other: torch is imported once."""
    cases = ["fine:0", *(f"killed:{rank}" for rank in (0, 3)), "crashed:3", "raised:1"]
    cases += ["misused:2", "unproved:0", "left:1"]
    run = started("many", *cases)
    told = [json.loads(line) for line in run.process.communicate(timeout=60)[0].splitlines()]
    assert [f"{t['scenario']}:{t['victim']}" for t in told] == cases
    for each in told:
        who, sentence = rf"rank {each['victim']} \(pid \d+\)", each["sentence"]
        expected = {
            "fine": "",
            "killed": rf"{who} was killed by SIGKILL \(.*memory runs out\); the other ranks were stopped",
            "crashed": rf"{who} was killed by SIGSEGV; the other ranks were stopped",
            "raised": rf"{who} failed with LookupError: the very cause",
            "misused": "expected this, got that; do so",
            "unproved": "the losses differ by 1",
            "left": rf"{who} ended with exit code 3; the other ranks were stopped",
        }[each["scenario"]]
        assert re.fullmatch(expected, sentence), each
        kinds = {"fine": "", "misused": "UsageError", "unproved": "ProofFailed"}
        assert each["error"] == kinds.get(each["scenario"], "RankFailed")
        assert ("and more of it" in each["traceback"]) == (each["scenario"] == "raised")
        assert ("in crashed" in each["traceback"]) == (each["scenario"] == "crashed")
    assert run.said() == [], "the agent, torch or a survivor wrote to the console"
    wait_for(lambda: not run.left_behind(set()), 5)


def test_killed_rank_ends_the_run_within_two_seconds(started):
    run = started("reduce_forever")
    pid, segments = run.ranks()[2], run.segments()
    os.kill(pid, signal.SIGKILL)
    start = time.monotonic()
    assert run.process.wait(10) == 1
    assert time.monotonic() - start < 2
    (sentence,) = run.said()
    assert sentence.startswith(f"script: rank 2 (pid {pid}) was killed by SIGKILL")
    wait_for(lambda: not run.left_behind(segments), 5)


@pytest.mark.parametrize("signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.full)])
def test_interrupted(started, signum):
    run = started("reduce_forever")
    run.ranks()
    wait_for(lambda: len(run.segments()) > 0, 10)
    segments, start = run.segments(), time.monotonic()
    if signum == signal.SIGINT:
        os.killpg(run.process.pid, signum)  # as the terminal does: every process of the group gets it
    else:
        os.kill(run.process.pid, signum)
    assert run.process.wait(10) == 128 + signum
    assert time.monotonic() - start < 2
    how = "interrupted" if signum == signal.SIGINT else "ended by SIGTERM"
    (sentence,) = run.said()
    assert re.fullmatch(rf"script: {how} at step \d+; every rank was stopped", sentence)
    wait_for(lambda: not run.left_behind(segments), 5)


def test_interrupted_with_a_stopped_rank(started):
    """It cannot act on SIGTERM, and the agent alone would wait 30 s for it."""
    run = started("reduce_forever")
    os.kill(run.ranks()[3], signal.SIGSTOP)
    start = time.monotonic()
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.process.wait(10) == 130
    assert time.monotonic() - start < 2
    assert len(run.said()) == 1
    wait_for(lambda: not run.left_behind(set()), 5)


@pytest.mark.parametrize("moment", ["fork server", pytest.param("ranks", marks=pytest.mark.full)])
def test_interrupted_while_starting(started, moment):
    run = started("reduce_forever")
    if moment == "fork server":  # importing torch, as the launcher does
        wait_for(lambda: any("libtorch_cpu" in text(Path(f"/proc/{pid}/maps")) for pid in run.children()), 20)
    else:
        wait_for(lambda: len(run.pids()) >= 5, 20)  # launcher, tracker, fork server and two of the four
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.process.wait(10) == 130
    (sentence,) = run.said()
    assert sentence.startswith("script: interrupted")
    wait_for(lambda: not run.left_behind(set()), 5)


def test_kill_9_of_the_launcher_leaves_nothing(started):
    run = started("reduce_forever")
    run.ranks()
    segments = run.segments()
    assert len(run.pids()) >= 6 and segments and list(run.temp.iterdir()), "or there is nothing to leave behind"
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.wait()
    wait_for(lambda: not run.left_behind(segments), 5)
    assert run.said() == []


def torchrun(ranks: int) -> tuple[str, ...]:
    return (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")


@pytest.mark.full
def test_torchrun_with_another_number_of_ranks_is_told_by_rank_0_alone(started):
    run = started("fine", command=torchrun(2))
    assert run.process.wait(40) == 1  # torchrun's own
    told = [line for line in run.said() if line.startswith("script:")]
    assert told == [
        "script: expected 4 ranks (parallel.tp x parallel.pp), got 2 from torchrun; "
        "start 4 with torchrun, or change parallel.tp or parallel.pp"
    ]
    assert re.search(r"exitcode +: 2", run.log.read_text())


def test_torchrun_ranks_are_used(started):
    run = started("fine", command=torchrun(4))
    assert len(run.ranks()) == 4
    assert run.process.wait(40) == 0
    assert len(run.log.read_text().split("up ")) == 5, "a rank started ranks of its own"


class Failure:
    def __init__(self, exitcode: int, timestamp: int = 0, pid: int = 7):
        self.exitcode, self.timestamp, self.pid = exitcode, timestamp, pid

    def signal_name(self) -> str:
        return signal.Signals(-self.exitcode).name


def test_verdict_prefers_the_killed_over_the_earliest():
    failures = {0: Failure(1, 10), 1: Failure(-15, 11), 2: Failure(-9, 12), 3: Failure(-15, 9)}
    echo = Report("error", "RuntimeError: connection reset", "", 1, 0.5)
    assert str(module._verdict(failures, [echo, None, None, None])).startswith("rank 2 (pid 7) was killed by SIGKILL")


def test_verdict_prefers_a_cause_over_an_earlier_echo():
    reports = [Report("transport", "PeerFailed: rank 1", "", 1, 0.5), Report("error", "KeyError: 'x'", "", 2, 0.6)]
    assert "rank 1 (pid 2) failed with KeyError" in str(module._verdict({0: Failure(1)}, reports))


def test_slate_keeps_progress_and_report_apart():
    slate = Slate()
    assert slate.read() == ("", None)
    slate.progress("at step 1000")
    slate.progress("at step 2")
    slate.fail(ValueError("ä" * 70_000))
    progress, report = slate.read()
    assert progress == "at step 2" and report.kind == "error" and len(report.sentence) > 70_000
