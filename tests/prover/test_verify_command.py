"""`tpmp verify`: one sentence for bad input, the exit codes, and nothing left behind however it ends."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import pytest

from tpmp_kernels import __main__ as command
from tpmp_kernels.prover import options, rank

HERE = Path(__file__).parent
DEMO = str(HERE.parents[1] / "examples" / "demo.toml")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--tp", "3"], "model.heads=4 is not divisible by parallel.tp=3; use tp in {1, 2, 4} or change heads"),
        (["--tp", "0"], "--tp: expected a whole number from 1 to 65536, got '0'; such as 2"),
        (["--pp", "two"], "--pp: expected a whole number from 1 to 65536, got 'two'; such as 2"),
        (["--pp"], "--pp: expected a value, got nothing; tpmp verify --help shows one for each option"),
        (
            ["--pp", "7"],
            "model.layers=4: expected at least 5 for 1 stage of 1f1b on each of",
        ),
        (["--schedule", "1f1c"], "parallel.schedule: expected one of gpipe, 1f1b,"),
        (["--dtype", "bf16"], "--dtype: expected fp64 or fp32, got 'bf16'; such as fp64"),
        (["--config", "no.toml"], "config: expected a TOML file, but 'no.toml' is none; examples/demo.toml is one"),
        (["--micro", "3"], "unknown option '--micro'; the nearest known one is '--microbatches'"),
        (["--quick=3"], "--quick: expected no value, got '3'; leave it out"),
        (["now"], "expected options only, got 'now'; tpmp verify --help lists them"),
        (["--config", DEMO, "--microbatches", "3"], "training.batch=16 is not divisible by parallel.microbatches=3;"),
        (["--microbatches", "65536"], "the reference's tensors take about "),
    ],
)
def test_bad_input_is_one_sentence(argv, sentence, capsys, monkeypatch):
    monkeypatch.setattr(options.shutil, "disk_usage", lambda folder: Usage)
    assert command.main(["verify", *argv]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"tpmp verify: {sentence}") and err.count("\n") == 1 and out == ""


class Usage:
    free = 2**30


def test_options_change_what_a_config_says():
    config = options.parse(["--config", DEMO, "--tp", "4", "--pp", "1", "--sequence-parallel", "--dtype", "fp32"])
    parallel = config.parallel
    assert (parallel.tp, parallel.pp, parallel.sequence_parallel, parallel.microbatches) == (4, 1, True, 8)
    assert (config.training.dtype, config.training.batch, config.optimizer.warmup_steps) == ("float32", 16, 100)
    quick = options.parse(["--microbatches", "3", "--quick"])
    assert (quick.training.batch, quick.data.sequence, quick.training.dtype) == (3, 32, "float64")


def test_without_options_it_is_the_demo_that_is_proved():
    demo, ours = options.parse(["--config", DEMO]), options.parse([])
    assert (ours.model, ours.parallel, ours.data) == (demo.model, demo.parallel, demo.data)
    assert (ours.ranks, ours.training.batch) == (4, demo.training.batch)


def test_help_and_refusals_load_no_torch():
    code = (
        "import sys; from tpmp_kernels.prover import options, rank; options.parse([]); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert rank.PRELOAD


class Run:
    """The command in a session of its own, its processes and its temporary files in view."""

    def __init__(self, *command: str):
        # Not pytest's: with it the sockets in there would have longer names than Linux allows.
        self.mark, self.temp = str(uuid.uuid4()), Path(tempfile.mkdtemp(prefix="tpmp-"))
        self.process = subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, "TPMP_TEST": self.mark, "TMPDIR": str(self.temp), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def pids(self) -> set[int]:
        return {int(p.parent.name) for p in Path("/proc").glob("[0-9]*/environ") if self.mark in _text(p)}

    def rank(self) -> int:
        """The pid of one of its ranks, which the fork server has forked."""
        parents = {pid: int(_text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()[1]) for pid in self.pids()}
        return max(pid for pid, parent in parents.items() if parents.get(parent) == self.process.pid)

    def finish(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=240)
        deadline = time.monotonic() + 10
        while (left := [*self.pids(), *self._files()]) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left
        return self.process.returncode, out, err

    def _files(self) -> list[Path]:
        return [path for path in self.temp.iterdir() if not path.name.startswith("torchinductor_")]  # torch's cache

    def kill(self) -> None:
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


@pytest.fixture
def started():
    runs = []

    def start(*command: str) -> Run:
        runs.append(Run(*command))
        return runs[-1]

    yield start
    for run in runs:
        run.kill()
        shutil.rmtree(run.temp)


QUICK = ("--quick", "--pp", "1", "--microbatches", "2")


@pytest.mark.full
def test_the_demo_model_is_equal(started):
    code, out, err = started("-m", "tpmp_kernels", "verify", *QUICK).finish()
    assert (code, err) == (0, "")
    title, _, table = out.partition("\n")
    assert title == "decoder of 4 layers, hidden 128: tp=2 x pp=1, 1f1b, 2 microbatches of 1 x 32 tokens, float64"
    assert table.endswith("\nequal: every difference is rounding\n")


@pytest.mark.full
@pytest.mark.parametrize("more", [(), ("--sequence-parallel", "--dtype", "fp32"), ("--tp", "4", "--pp", "1")])
def test_the_demo_at_its_own_size_is_equal(started, more):
    code, out, err = started("-m", "tpmp_kernels", "verify", *more).finish()
    assert (code, err) == (0, "") and "equal: every" in out


@pytest.mark.full
def test_a_decoder_that_forgets_its_reductions_is_different(started):
    code, out, err = started(str(HERE / "command_script.py"), *QUICK).finish()
    first = "layers.0.self_attn.o_proj, forward, microbatch 0: each rank holds a partial sum"
    assert code == 1
    assert f"\nDIFFERENT, first: {first}" in out
    assert err.startswith(f"tpmp verify: the proof failed: {first}") and err.count("\n") == 1


@pytest.mark.full
@pytest.mark.parametrize("end", ["SIGINT", "SIGTERM", "a rank killed", "SIGKILL"])
def test_nothing_is_left_behind(started, end):
    run = started("-m", "tpmp_kernels", "verify")
    assert run.process.stdout.readline().startswith("decoder of 4 layers")
    time.sleep(2)  # into the reference, or past it
    victim = run.rank()
    if end == "a rank killed":
        os.kill(victim, signal.SIGKILL)
    elif end == "SIGINT":
        os.killpg(run.process.pid, signal.SIGINT)
    else:
        os.kill(run.process.pid, getattr(signal, end))
    code, _, err = run.finish()
    expected = {
        "SIGINT": (130, r"tpmp verify: interrupted in the (reference|parallel step|replay); every rank was stopped\n"),
        "SIGTERM": (143, r"tpmp verify: ended by SIGTERM in the \w[ \w]*; every rank was stopped\n"),
        "a rank killed": (1, rf"tpmp verify: rank \d \(pid {victim}\) was killed by SIGKILL \(.*\n"),
        "SIGKILL": (-signal.SIGKILL, ""),
    }[end]
    assert code == expected[0] and re.fullmatch(expected[1], err), err
