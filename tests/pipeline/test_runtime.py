"""The runtime executes schedules: bit-equal to the same microbatches in one process, within the validator's bound."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tpmp_kernels.comm import SelfCommunicator, communicator
from tpmp_kernels.errors import ScheduleError
from tpmp_kernels.pipeline.runtime import Runtime
from tpmp_kernels.pipeline.schedule import Action, Kind, Schedule
from tpmp_kernels.pipeline.schedules import build
from tpmp_kernels.pipeline.stage import Stage
from tpmp_kernels.pipeline.validate import validate

ROWS, WIDTH = 3, 8


def layers(stages: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)) for _ in range(stages)]


def squared_error(output, target):
    return (output - target).square().sum()


def data(microbatches: int):
    torch.manual_seed(1)
    return torch.randn(microbatches, ROWS, WIDTH).unbind(), torch.randn(microbatches, ROWS, WIDTH).unbind()


class Counted(Stage):
    """Remembers how many microbatches were live at most."""

    peak = 0

    def forward(self, *args):
        output = super().forward(*args)
        self.peak = max(self.peak, self.live)
        return output


def run_pipeline(schedule: str, microbatches: int):
    with communicator(dist.group.WORLD, name="pp") as comm:
        module = layers(comm.size)[comm.rank]
        stage = Counted(module, loss=squared_error if comm.rank == comm.size - 1 else None)
        plan = build(schedule, ranks=comm.size, microbatches=microbatches)
        runtime = Runtime(plan, {comm.rank: stage}, comm, shape=(ROWS, WIDTH), dtype=torch.float32)
        inputs, targets = data(microbatches)
        first = runtime.step(inputs, targets, loss_scale=0.5)
        second = runtime.step(inputs, targets, loss_scale=0.5)  # a runtime is used again and again
        grads = [p.grad.clone() for p in module.parameters()]
        return first.losses, second.losses, grads, stage.peak, stage.live, [e[:3] for e in first.events]


def one_process(stages: int, microbatches: int):
    model = nn.Sequential(*layers(stages))
    inputs, targets = data(microbatches)
    losses = []
    for _ in range(2):
        for x, y in zip(inputs, targets, strict=True):
            loss = squared_error(model(x), y)
            loss.backward(torch.tensor(0.5))
            losses.append(loss.detach())
    return losses, [[p.grad for p in stage.parameters()] for stage in model]


@pytest.mark.parametrize("microbatches", [1, 3, 8])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "1f1b-eager"])
@pytest.mark.parametrize("size", [2, 4])
def test_losses_and_gradients_are_those_of_one_process_bitwise(ranks, size, schedule, microbatches):
    losses, grads = one_process(size, microbatches)
    report = validate(build(schedule, ranks=size, microbatches=microbatches))
    results = ranks(size).run(run_pipeline, schedule, microbatches)
    for rank, (first, second, ours, peak, live, events) in enumerate(results):
        assert [*first, *second] == (losses if rank == size - 1 else [])
        assert all(torch.equal(a, b) for a, b in zip(ours, grads[rank], strict=True))
        assert peak == report.peak_live[rank] and live == 0
        assert len(events) == 2 * microbatches


def run_forward_only():
    with communicator(dist.group.WORLD, name="pp") as comm, torch.no_grad():
        stage = Stage(layers(comm.size)[comm.rank], loss=squared_error if comm.rank == comm.size - 1 else None)
        plan = build("forward-only", ranks=comm.size, microbatches=4)
        result = Runtime(plan, {comm.rank: stage}, comm, shape=(ROWS, WIDTH), dtype=torch.float32).step(*data(4))
        return result.losses, stage.live


def test_forward_only_keeps_no_activations(ranks):
    results = ranks(2).run(run_forward_only)
    assert results[1][0] == one_process(2, 4)[0][:4]
    assert [live for _, live in results] == [0, 0]


def run_disagreeing():
    with communicator(dist.group.WORLD, name="pp") as comm:
        plan = build("1f1b", ranks=2, microbatches=8 - comm.rank)
        Runtime(plan, {}, comm, shape=(1,), dtype=torch.float32)


def run_disagreeing_tensor_parallel():
    with communicator(dist.group.WORLD, name="tp") as tp:
        plan = build("1f1b", ranks=1, microbatches=8 - tp.rank)
        Runtime(plan, {}, SelfCommunicator(), shape=(1,), dtype=torch.float32, tensor_parallel=tp)


@pytest.mark.parametrize("run", [run_disagreeing, run_disagreeing_tensor_parallel])
def test_ranks_that_disagree_about_the_schedule_are_told_before_the_first_step(ranks, run):
    for outcome in ranks(2).outcomes(run):
        assert isinstance(outcome.error, ScheduleError)
        assert "another rank runs a different one" in str(outcome.error)


def test_one_rank_runs_a_schedule_alone():
    model = nn.Sequential(*layers(1))
    runtime = Runtime(
        build("1f1b", ranks=1, microbatches=3),
        {0: Stage(model, loss=squared_error)},
        SelfCommunicator(),
        shape=(ROWS, WIDTH),
        dtype=torch.float32,
    )
    assert runtime.step(*data(3)).losses == one_process(1, 3)[0][:3]


class Told(nn.Linear):
    """Notes which step and microbatch each call is for."""

    def forward(self, x, *, step, microbatch):
        self.turns.append((step, microbatch))
        return super().forward(x)


@pytest.mark.parametrize("given", [{}, {"step": 5}])
def test_a_numbered_stage_is_told_step_and_microbatch(given):
    module = Told(WIDTH, WIDTH)
    module.turns = []
    stages = {0: Stage(module, loss=squared_error, numbered=True)}
    plan = build("1f1b", ranks=1, microbatches=3)
    Runtime(plan, stages, SelfCommunicator(), shape=(ROWS, WIDTH), dtype=torch.float32).step(*data(3), **given)
    assert module.turns == [(given.get("step"), m) for m in range(3)]


def test_a_schedule_that_the_runtime_cannot_compute_is_refused():
    actions = tuple(Action(kind, 0, 0) for kind in (Kind.F, Kind.B, Kind.W))
    with pytest.raises(ScheduleError, match="the runtime computes F and BW, but schedule mine has B, W; choose one"):
        Runtime(Schedule("mine", (0,), 1, (actions,)), {}, SelfCommunicator(), shape=(1,), dtype=torch.float32)
