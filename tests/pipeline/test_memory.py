"""What a pass holds is what was predicted of it, for every schedule: from what each stage alone holds."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tpmp_kernels import ops
from tpmp_kernels.comm import communicator
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


@pytest.mark.parametrize("recompute", [False, True])
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


class Bare(nn.Linear):
    def forward(self, x):
        return ops.linear(x, self.weight, self.bias)


def test_between_b_and_w_wait_the_operands_of_the_weight_gradients_alone():
    """The gradient of the output and the input; not the gradient of the input, which was sent."""
    held = held_bytes(Stage(Bare(WIDTH, 3 * WIDTH)), torch.randn(ROWS, WIDTH).requires_grad_())
    assert held == (MESSAGE, 4 * MESSAGE)
