"""Pipeline schedules run over the nccl transport, whose messages have no buffer: the same bits as over shm."""

import pytest
import torch
import torch.distributed as dist
from nccl_world import connected
from torch import nn

from tpmp_kernels.comm import communicator
from tpmp_kernels.comm._ext import C
from tpmp_kernels.pipeline.runtime import Runtime
from tpmp_kernels.pipeline.schedules import SCHEDULES, build
from tpmp_kernels.pipeline.stage import Stage

pytestmark = pytest.mark.skipif(C is None, reason="needs the compiled extension")

ROWS, WIDTH, MICROBATCHES = 3, 8, 4
TRAINING = [name for name in SCHEDULES if name != "forward-only"]
USUAL = ("1f1b", "interleaved-1f1b", "zb-v")


def _squared_error(output, target):
    return (output - target).square().sum()


def _step(comm, name: str) -> list:
    plan = build(name, ranks=comm.size, microbatches=MICROBATCHES)
    torch.manual_seed(0)
    modules = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(plan.stages)]
    data = torch.randn(2, MICROBATCHES, ROWS, WIDTH)
    last = plan.stages - 1
    stages = {
        number: Stage(modules[number], loss=_squared_error if number == last else None)
        for number, holder in enumerate(plan.placement)
        if holder == comm.rank
    }
    runtime = Runtime(plan, stages, comm, shape=(ROWS, WIDTH), dtype=torch.float32)
    losses = runtime.step(data[0].unbind(), data[1].unbind()).losses
    grads = [p.grad for stage in stages.values() for p in stage.module.parameters()]
    return [*losses, *grads]


def _both(name: str) -> bool:
    with communicator(dist.group.WORLD, transport="shm") as comm:
        want = _step(comm, name)
    with connected(timeout=10) as comm:
        found = _step(comm, name)
    return len(want) == len(found) > 0 and all(map(torch.equal, want, found))


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.full] * (n not in USUAL)) for n in TRAINING])
def test_a_step_has_the_bits_of_shm(ranks, name, size):
    assert ranks(size).run(_both, name, timeout=60) == [True] * size
