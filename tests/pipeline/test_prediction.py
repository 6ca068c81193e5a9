"""What the simulator predicts from measured costs is what the runtime takes, for every schedule: emulated, with stages
that sleep for a set time, because ranks that compute would share the cores of a small machine."""

import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tpmp_kernels.comm import communicator
from tpmp_kernels.pipeline.measured import measured
from tpmp_kernels.pipeline.runtime import Runtime
from tpmp_kernels.pipeline.schedules import SCHEDULES, build
from tpmp_kernels.pipeline.simulate import simulate
from tpmp_kernels.pipeline.stage import Stage

SECONDS = {"F": 0.048, "B": 0.056, "W": 0.040}
MICROBATCHES = 8


class Sleeping(Stage):
    """Takes, for all stages of a rank together, the set seconds a microbatch."""

    def __init__(self, module: nn.Module, chunks: int, **options):
        super().__init__(module, **options)
        self.chunks = chunks

    def _sleep(self, *kinds: str) -> None:
        time.sleep(sum(SECONDS[kind] for kind in kinds) / self.chunks)

    def forward(self, *args):
        self._sleep("F")
        return super().forward(*args)

    def backward(self, *args):
        self._sleep("B", "W")
        return super().backward(*args)

    def backward_input(self, *args):
        self._sleep("B")
        return super().backward(*args)

    def backward_weight(self, microbatch: int):
        self._sleep("W")

    # Of super().backward_input nothing is used: it would call `backward`, which sleeps for both.


def run_asleep(name: str) -> tuple:
    with communicator(dist.group.WORLD, name="pp") as comm:
        plan = build(name, ranks=comm.size, microbatches=MICROBATCHES)
        chunks, last = plan.stages // comm.size, plan.stages - 1
        stages = {
            number: Sleeping(nn.Tanh(), chunks, loss=(lambda y, target: y.sum()) if number == last else None)
            for number, rank in enumerate(plan.placement)
            if rank == comm.rank
        }
        runtime = Runtime(plan, stages, comm, shape=(4, 4), dtype=torch.float32)
        batch = [torch.ones(4, 4, requires_grad=True)] * MICROBATCHES
        runtime.step(batch, batch)
        comm.barrier()
        gathered: list = [None] * comm.size
        dist.all_gather_object(gathered, runtime.step(batch, batch).times)
        took = measured(runtime.lowered, gathered)
        predicted = simulate(runtime.lowered, took.costs)
        return took.makespan, predicted.makespan, took.bubble_ratio, predicted.bubble_ratio


ALWAYS = [("zb-v", 2)]
EVERY = [(name, size) for size in (2, 4) for name in SCHEDULES if name != "forward-only"]


@pytest.mark.parametrize(
    ("name", "size"), [pytest.param(*each, marks=[pytest.mark.full] * (each not in ALWAYS)) for each in EVERY]
)
def test_makespan_within_8_percent_and_bubble_within_5_points(ranks, name, size):
    makespan, predicted, bubble, expected = ranks(size).run(run_asleep, name)[0]
    assert makespan == pytest.approx(predicted, rel=0.08), f"bubble {bubble:.3f}, predicted {expected:.3f}"
    assert bubble == pytest.approx(expected, abs=0.05)
