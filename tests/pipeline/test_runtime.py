"""The runtime executes schedules: bit-equal to the same microbatches in one process, within the validator's bound."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tpmp_kernels import ops
from tpmp_kernels.comm import SelfCommunicator, communicator
from tpmp_kernels.errors import PeerFailed, ScheduleError, StageFailed
from tpmp_kernels.pipeline.runtime import Runtime
from tpmp_kernels.pipeline.schedule import Schedule
from tpmp_kernels.pipeline.schedules import SCHEDULES, build
from tpmp_kernels.pipeline.stage import Stage

ROWS, WIDTH = 3, 8


class Block(nn.Module):
    """Our ops, whose backward comes apart, around a norm and a torch module, whose does not."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        h = ops.linear(self.norm(x), self.up.weight, self.up.bias, activation="gelu")
        return torch.tanh(self.linear(ops.linear(h, self.down.weight, self.down.bias, residual=x)))


def layers(stages: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [Block() for _ in range(stages)]


def squared_error(output, target):
    return (output - target).square().sum()


def data(microbatches: int):
    torch.manual_seed(1)
    return torch.randn(microbatches, ROWS, WIDTH).unbind(), torch.randn(microbatches, ROWS, WIDTH).unbind()


def stages_of(schedule: Schedule, rank: int, **how) -> dict[int, Stage]:
    modules, last = layers(schedule.stages), schedule.stages - 1
    return {
        number: Stage(modules[number], loss=squared_error if number == last else None, **how)
        for number, holder in enumerate(schedule.placement)
        if holder == rank
    }


def run_pipeline(schedule: str, microbatches: int, how: dict):
    with communicator(dist.group.WORLD, name="pp") as comm:
        plan = build(schedule, ranks=comm.size, microbatches=microbatches)
        stages = stages_of(plan, comm.rank, **how)
        runtime = Runtime(plan, stages, comm, shape=(ROWS, WIDTH), dtype=torch.float32)
        inputs, targets = data(microbatches)
        first = runtime.step(inputs, targets, loss_scale=0.5)
        second = runtime.step(inputs, targets, loss_scale=0.5)  # a runtime is used again and again
        grads = {number: [p.grad.clone() for p in stage.module.parameters()] for number, stage in stages.items()}
        computes = [each[:3] for each in first.events]
        return first.losses, second.losses, grads, sum(stage.live for stage in stages.values()), computes


def one_process(stages: int, microbatches: int, compile: bool | str = False):
    blocks = layers(stages)
    model = nn.Sequential(*(torch.compile(block, backend=compile) if compile else block for block in blocks))
    ops.attach_main_grad(model.parameters())
    inputs, targets = data(microbatches)
    losses = []
    for _ in range(2):
        for x, y in zip(inputs, targets, strict=True):
            loss = squared_error(model(x), y)
            loss.backward(torch.tensor(0.5))
            losses.append(loss.detach())
    return losses, [[p.grad for p in stage.parameters()] for stage in model]


WITH_BACKWARD = [name for name in SCHEDULES if name != "forward-only"]
SIZES = [(2, 3), (2, 1), (2, 8), (3, 5), (4, 1), (4, 3), (4, 8)]
EVERY = [(name, *size) for name in WITH_BACKWARD for size in SIZES]
ALWAYS = [*((name, 2, 3) for name in WITH_BACKWARD), ("interleaved-1f1b", 4, 8), ("zb-v", 4, 8)]


@pytest.mark.parametrize(
    ("schedule", "size", "microbatches"),
    [pytest.param(*each, marks=[pytest.mark.full] * (each not in ALWAYS)) for each in EVERY],
)
def test_losses_and_gradients_are_those_of_one_process_bitwise(ranks, schedule, size, microbatches):
    check_bitwise(ranks, size, schedule, microbatches, {})


@pytest.mark.parametrize("schedule", [pytest.param("1f1b", marks=pytest.mark.full), "zb-v"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("compile", [False, "aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_recomputed_and_compiled_stages_too(ranks, schedule, compile, recompute):
    check_bitwise(ranks, 2, schedule, 3, {"compile": compile, "recompute": recompute})


def check_bitwise(ranks, size: int, schedule: str, microbatches: int, how: dict) -> None:
    try:
        plan = build(schedule, ranks=size, microbatches=microbatches)
    except ValueError as error:
        pytest.skip(str(error))
    losses, grads = one_process(plan.stages, microbatches, how.get("compile", False))
    results = ranks(size).run(run_pipeline, schedule, microbatches, how)
    for rank, (first, second, ours, live, computes) in enumerate(results):
        assert [*first, *second] == (losses if rank == plan.placement[-1] else [])
        for number, each in ours.items():
            assert all(torch.equal(a, b) for a, b in zip(each, grads[number], strict=True))
        assert live == 0
        assert computes == [(kind.name, *of) for kind, *of in plan.apart().actions[rank]]


def run_forward_only():
    with communicator(dist.group.WORLD, name="pp") as comm, torch.no_grad():
        plan = build("forward-only", ranks=comm.size, microbatches=4)
        stages = stages_of(plan, comm.rank)
        result = Runtime(plan, stages, comm, shape=(ROWS, WIDTH), dtype=torch.float32).step(*data(4))
        return result.losses, stages[comm.rank].live


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


def run_varying():
    """Microbatches of 2, 5 and 3 rows: gradients of the mean over all of them, and the losses on every rank."""
    with communicator(dist.group.WORLD, name="pp") as comm:
        plan = build("zb-h1", ranks=comm.size, microbatches=3)
        stages, rows = stages_of(plan, comm.rank), (2, 5, 3)
        runtime = Runtime(plan, stages, comm, shape=(), dtype=torch.float32, losses_everywhere=True)
        inputs, targets = (torch.cat(each)[:10].split(rows) for each in data(4))
        shapes = [(n, WIDTH) for n in rows]
        result = runtime.step(inputs, targets, loss_scale=1 / sum(rows), shapes=shapes)
        return result.losses, [p.grad.clone() for p in stages[comm.rank].module.parameters()]


def test_lengths_may_vary_and_the_mean_is_over_all_tokens(ranks):
    model = nn.Sequential(*layers(2)).double()
    inputs, targets = (torch.cat(each)[:10].double() for each in data(4))
    squared_error(model(inputs), targets).div(10).backward()
    results = ranks(2).run(run_varying)
    assert results[0][0] == results[1][0] and len(results[0][0]) == 3
    for (_, grads), stage in zip(results, model, strict=True):
        for ours, exact in zip(grads, stage.parameters(), strict=True):
            torch.testing.assert_close(ours.double(), exact.grad, rtol=1e-5, atol=1e-6)


class Failing(Block):
    def forward(self, x):
        if self.calls == 2:
            raise FloatingPointError("the third is one too many")
        self.calls += 1
        return super().forward(x)


def run_failing():
    with communicator(dist.group.WORLD, name="pp") as comm:
        plan = build("1f1b", ranks=comm.size, microbatches=4)
        stages = stages_of(plan, comm.rank)
        if comm.rank == 1:
            stages[1].module = stages[1]._call = Failing()
            stages[1].module.calls = 0
        try:
            Runtime(plan, stages, comm, shape=(ROWS, WIDTH), dtype=torch.float32).step(*data(4))
        finally:
            assert stages[comm.rank].live == 0


def test_an_exception_names_stage_kind_and_microbatch_on_every_rank(ranks):
    first, second = ranks(2).outcomes(run_failing)
    words = "F of stage 1, microbatch 2 raised FloatingPointError: the third is one too many"
    assert isinstance(second.error, StageFailed) and str(second.error) == words
    assert isinstance(first.error, PeerFailed) and words in str(first.error)


@pytest.mark.parametrize(
    ("stages", "sentence"),
    [
        ({}, r"1f1b: rank 0 holds stage 0, but got stages \[\]; pass one Stage for each of its numbers"),
        ({0: Stage(Block())}, "1f1b: stage 0 of 1 has no loss; give loss= to the last stage, and to no other"),
    ],
)
def test_stages_that_do_not_fit_the_schedule_are_refused(stages, sentence):
    plan = build("1f1b", ranks=1, microbatches=2)
    with pytest.raises(ScheduleError, match=sentence):
        Runtime(plan, stages, SelfCommunicator(), shape=(1,), dtype=torch.float32)


def run_measured(schedule: str):
    with communicator(dist.group.WORLD, name="pp") as comm:
        plan = build(schedule, ranks=comm.size, microbatches=8)
        stages = stages_of(plan, comm.rank)
        runtime = Runtime(plan, stages, comm, shape=(512, WIDTH), dtype=torch.float32, measure_memory=True)
        inputs, targets = (torch.randn(8, 512, WIDTH).unbind() for _ in range(2))
        runtime.step(inputs, targets)
        return runtime.step(inputs, targets).live_bytes


def test_what_is_held_is_what_the_proof_allows(ranks):
    """gpipe holds all 8 microbatches, 1f1b two and one; nothing is left behind the step."""
    peaks = {}
    for schedule in ("gpipe", "1f1b"):
        levels = ranks(2).run(run_measured, schedule)
        assert [each[-1] < max(each) / 8 for each in levels] == [True, True]
        peaks[schedule] = [max(each) for each in levels]
    first, last = (gpipe / one for gpipe, one in zip(peaks["gpipe"], peaks["1f1b"], strict=True))
    assert 3 < first < 5 and 5 < last < 9


def test_inputs_of_the_first_stage_stay_as_they_are():
    inputs, targets = data(2)
    plan = build("1f1b", ranks=1, microbatches=2)
    runtime = Runtime(plan, stages_of(plan, 0), SelfCommunicator(), shape=(ROWS, WIDTH), dtype=torch.float32)
    runtime.step(inputs, targets)
    assert all(not x.requires_grad and x.grad is None for x in inputs)


def test_a_stage_names_the_matrices_that_have_no_part_in_w():
    plan = build("zb-h1", ranks=1, microbatches=2)
    stages = stages_of(plan, 0)
    Runtime(plan, stages, SelfCommunicator(), shape=(ROWS, WIDTH), dtype=torch.float32).step(*data(2))
    assert stages[0].whole == ["linear.weight"]
