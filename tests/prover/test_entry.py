"""`tpmp_kernels.verify`: what it refuses, what becomes of a rank that fails, and where it runs."""

import multiprocessing
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from small_model import Model, batch, loss, parallel, parallel_loss
from test_right import Stock, regression

from tpmp_kernels import verify
from tpmp_kernels.errors import ScheduleError
from tpmp_kernels.prover import entry
from tpmp_kernels.tensor_parallel import RowParallelLinear
from tpmp_kernels.training.launch import RankFailed

TABLE = {"up": "colwise", "down": "rowwise"}


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"tp": 0}, ValueError, "verify: tp must be a whole number from 1, got 0"),
        ({"pp": 1.5}, ValueError, "verify: pp must be a whole number from 1, got 1.5"),
        ({"dtype": torch.bfloat16}, ValueError, "verify: dtype must be torch.float64 or torch.float32, got torch.bf"),
        (
            {"microbatches": 3},
            ValueError,
            r"verify: inputs are \[8, 5, 8\], which cannot be cut along dimension 0 into 3",
        ),
        ({"pp": 2}, ValueError, "verify: pp is 2, but a table shards a whole module; pass a function"),
        ({"schedule": "zb"}, ValueError, "schedule 'zb' is unknown; did you mean"),
        ({"model_fn": lambda: Stock()}, TypeError, "verify: its arguments are sent to the ranks, which fails with: "),
    ],
)
def test_arguments_that_cannot_be_are_refused_before_a_rank_starts(arguments, error, sentence):
    before = multiprocessing.active_children()
    with pytest.raises(error, match=sentence):
        verify(**{"model_fn": Stock, "batch": regression(), "plan": TABLE, **arguments})
    assert multiprocessing.active_children() == before


def test_the_schedule_is_proved_first(monkeypatch):
    def refuse(schedule, *args, **options):
        raise ScheduleError(f"not {schedule.name}")

    monkeypatch.setattr(entry, "validate", refuse)
    with pytest.raises(ScheduleError, match="not gpipe"):
        verify(Stock, regression(), TABLE, schedule="gpipe")


def test_what_the_plan_refuses_is_raised_here(ranks):
    with pytest.raises(ValueError, match="plan: 'upp' matches no module; nearest are up") as caught:
        verify(Stock, regression(), {"upp": "colwise"}, tp=1, pool=ranks(1))
    assert caught.value.__notes__[0].startswith("on rank ")
    with pytest.raises(ValueError, match="verify: expected a pool of tp x pp = 4 ranks, got one of 1"):
        verify(Stock, regression(), TABLE, tp=4, pool=ranks(1))
    with pytest.raises(TypeError, match="verify: plan must return the module that it made parallel, got NoneType"):
        verify(Stock, regression(), returns_nothing, tp=1, pool=ranks(1))


def returns_nothing(module, comm):
    return None


class Raises(RowParallelLinear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.comm.rank == 1:
            raise LookupError("the very cause")
        return super().forward(x)


class Dies(RowParallelLinear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.comm.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (Raises, "failed with StageFailed: F of stage 0, microbatch 0 raised LookupError: the very cause"),
        (Dies, "was killed by SIGKILL"),
    ],
)
def test_a_rank_that_fails_is_named(ranks, kind, sentence):
    given = {"model_fn": Model, "batch": batch(), "loss": loss, "parallel_loss": parallel_loss, "pool": ranks(2)}
    with pytest.raises(RankFailed) as caught:
        verify(**given, plan=partial(parallel, down=kind))
    assert str(caught.value).startswith(f"verify: rank 1 of 2 {sentence}")


@pytest.mark.full
def test_ranks_of_its_own_are_gone_behind_it():
    before = set(multiprocessing.active_children())
    assert verify(Stock, regression(), TABLE, tp=2).equal
    assert set(multiprocessing.active_children()) == before


SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
from test_right import Stock, regression
from tpmp_kernels import verify
report = verify(Stock, regression(), {{"up": "colwise", "down": "rowwise"}}, tp=2, microbatches=2)
assert report.equal, report
print("equal on this rank")
"""


@pytest.mark.full
def test_under_torchrun_it_uses_the_ranks_given(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(folder=str(Path(__file__).parent)))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal on this rank") == 2


def test_the_package_stays_light():
    code = "import sys, tpmp_kernels; assert callable(tpmp_kernels.__getattr__); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
