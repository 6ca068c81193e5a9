"""The programs of the tensor_parallel suite compute the same: small, their losses follow one process in plain SGD."""

import sys

import pytest
import torch
import torch.distributed as dist

from benchmarks import parallel_gpt
from benchmarks.peers import gpt, megatron_layers
from benchmarks.suites import test_tensor_parallel as suite
from tpmp_kernels.comm import communicator

TINY = ["--hidden=32", "--heads=2", "--mlp=64", "--vocab=64", "--sequence=16", "--layers=2", "--steps=1"]
# SGD with a large step: a gradient of the wrong scale, which AdamW would hide, moves the next loss
SGD = ["--optimizer", "sgd", "--lr", "0.5"]


def run_ours(options: list[str]) -> list[float]:
    args = parallel_gpt.options().parse_args(options)
    with communicator(dist.group.WORLD, name="tp") as comm:
        step = parallel_gpt.stepper(args, comm)
        return [step(i) for i in range(3)]


def run_megatron(options: list[str]) -> list[float]:
    step = megatron_layers.stepper(megatron_layers.options().parse_args(options))
    return [step(i) for i in range(3)]


def losses_of_one_process(options: list[str]) -> list[float]:
    step = suite.plain_torch(parallel_gpt.options().parse_args(options))
    return [step(i) for i in range(3)]


@pytest.mark.full
@pytest.mark.parametrize("run", [run_ours, run_megatron])
def test_program_follows_one_process(ranks, run):
    if run is run_megatron and megatron_layers.missing():
        pytest.skip(megatron_layers.missing())
    for losses in ranks(2).run(run, [*TINY, *SGD]):
        assert losses == pytest.approx(losses_of_one_process([*TINY, *SGD]), rel=1e-5)


@pytest.mark.full
def test_contenders_of_the_suite_agree_and_are_timed_on_every_rank(ranks):
    for timings in ranks(2).run(suite.time_steps, TINY):
        assert list(timings) == suite.present()
        assert all(len(timing.samples) == 1 for timing in timings.values())


def run_memory() -> tuple[int, int | None]:
    before = suite.tensor_bytes()
    held = torch.zeros(1000)
    return suite.tensor_bytes() - before - held.nbytes, suite.memory_of(suite.OURS, TINY)


@pytest.mark.full
def test_memory_counts_model_optimizer_and_step():
    parameters = sum(p.numel() for p in gpt.GPT(gpt.Config(2, 32, 2, 64, 64, 16)).parameters())
    for miscounted, memory in suite.in_processes_of_their_own(run_memory):
        assert miscounted == 0
        assert memory is None or memory > 0.5 * 3 * 4 * parameters


def test_megatron_that_is_not_installed_is_a_row_with_the_remedy(monkeypatch, capsys):
    monkeypatch.setattr(megatron_layers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["megatron_layers"])
    megatron_layers.main()
    assert "cannot run: Megatron-Core is not installed; pip install --no-deps megatron-core" in capsys.readouterr().out
