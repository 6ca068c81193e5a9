"""What a pass holds is what was predicted of it, for every schedule: from what each stage alone holds."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tpmp_kernels import ops
from tpmp_kernels.comm import SelfCommunicator, communicator
from tpmp_kernels.models import Decoder, ModelConfig, initialize
from tpmp_kernels.pipeline.lowering import lower
from tpmp_kernels.pipeline.memory import held_bytes, predict_bytes
from tpmp_kernels.pipeline.runtime import Runtime
from tpmp_kernels.pipeline.schedules import SCHEDULES, build
from tpmp_kernels.pipeline.stage import Stage

ROWS, WIDTH, MICROBATCHES = 64, 32, 8
MESSAGE = 4 * ROWS * WIDTH


class Block(nn.Module):
    """Twice as wide inside for odd numbers, so that stages hold different amounts. Its norm's part of the backward is
    whole, that of its ops comes apart."""

    def __init__(self, number: int):
        super().__init__()
        inner = (4 if number % 2 else 2) * WIDTH
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, inner), nn.Linear(inner, WIDTH)

    def forward(self, x):
        h = ops.linear(self.norm(x), self.up.weight, self.up.bias, activation="gelu")
        return ops.linear(h, self.down.weight, self.down.bias, residual=x)


def squared_error(output, target):
    return (output - target).square().sum()


def run(name: str, recompute: bool):
    """What every stage holds, and what this rank held behind each step."""
    with communicator(dist.group.WORLD, name="pp") as comm:
        plan = build(name, ranks=comm.size, microbatches=MICROBATCHES)
        torch.manual_seed(0)
        last = plan.stages - 1
        stages = [
            Stage(Block(number), loss=squared_error if number == last else None, recompute=recompute)
            for number in range(plan.stages)
        ]
        x, target = torch.randn(2, ROWS, WIDTH).unbind()
        received = x.clone().requires_grad_()
        held = [held_bytes(s, received if n else x, target if s.loss else None) for n, s in enumerate(stages)]
        mine = {n: stage for n, stage in enumerate(stages) if plan.placement[n] == comm.rank}
        runtime = Runtime(plan, mine, comm, shape=(ROWS, WIDTH), dtype=torch.float32, measure_memory=True)
        return held, runtime.step([x] * MICROBATCHES, [target] * MICROBATCHES).live_bytes


@pytest.mark.parametrize("recompute", [False, pytest.param(True, marks=pytest.mark.full)])
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "forward-only"])
def test_the_peak_of_every_schedule_is_the_predicted_one(ranks, name, size, recompute):
    """Never less, at most a tenth more: what was sent may be kept longer, until the sender's thread lets go."""
    try:
        plan = build(name, ranks=size, microbatches=MICROBATCHES)
    except ValueError as error:
        pytest.skip(str(error))
    results = ranks(size).run(run, name, recompute)
    predicted = predict_bytes(lower(plan.apart()), results[0][0], message=MESSAGE)
    for (_, levels), expected in zip(results, predicted, strict=True):
        more = max(levels) - max(expected)
        assert 0 <= more <= min(0.1 * max(expected), 2 * MESSAGE)
        assert levels[-1] <= 2 * MESSAGE and expected[-1] == 0


def run_decoder(name: str):
    """The same of the decoder, with dropout, an embedding in the first stage and head and loss in the last."""
    tokens = torch.arange(2 * 48).view(2, 48) % 64
    with communicator(dist.group.WORLD, name="pp") as comm:
        plan = build(name, ranks=comm.size, microbatches=MICROBATCHES)
        config = ModelConfig(vocab_size=64, hidden=WIDTH, layers=plan.stages, heads=4, kv_heads=2, ffn=48, dropout=0.1)
        parts = [Decoder(config, SelfCommunicator(), range(n, n + 1), dropout_seed=1) for n in range(plan.stages)]
        for part in parts:
            initialize(part, seed=0, layers=plan.stages)
        stages = [Stage(part, loss=part.loss if part.last else None, numbered=True) for part in parts]
        received = torch.randn(*tokens.shape, WIDTH).requires_grad_()
        held = [
            held_bytes(s, received if n else tokens, tokens if s.loss else None, step=0) for n, s in enumerate(stages)
        ]
        mine = {n: stage for n, stage in enumerate(stages) if plan.placement[n] == comm.rank}
        runtime = Runtime(plan, mine, comm, shape=received.shape, dtype=torch.float32, measure_memory=True)
        return held, runtime.step([tokens] * MICROBATCHES, [tokens] * MICROBATCHES, step=0).live_bytes


@pytest.mark.parametrize("name", ["1f1b", "zb-v"])
def test_of_a_decoder_too(ranks, name):
    results = ranks(2).run(run_decoder, name)
    lowered = lower(build(name, ranks=2, microbatches=MICROBATCHES))
    predicted = predict_bytes(lowered, results[0][0], message=4 * 2 * 48 * WIDTH)
    for (_, levels), expected in zip(results, predicted, strict=True):
        assert max(levels) == pytest.approx(max(expected), rel=0.1)


class Bare(nn.Linear):
    def forward(self, x):
        return ops.linear(x, self.weight, self.bias)


def test_between_b_and_w_wait_the_operands_of_the_weight_gradients_alone():
    """The gradient of the output and the input; not the gradient of the input, which was sent."""
    held = held_bytes(Stage(Bare(WIDTH, 3 * WIDTH)), torch.randn(ROWS, WIDTH).requires_grad_())
    assert held == (MESSAGE, 4 * MESSAGE)
