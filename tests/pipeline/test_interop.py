"""torch.distributed.pipelining and this runtime take each other's stages: the same losses and gradients either way."""

import torch
import torch.distributed as dist
from test_runtime import ROWS, WIDTH, data, layers, one_process, squared_error
from torch.distributed import pipelining

from tpmp_kernels import ops
from tpmp_kernels.comm import communicator
from tpmp_kernels.pipeline.runtime import Runtime
from tpmp_kernels.pipeline.schedules import build
from tpmp_kernels.pipeline.stage import Stage

MICROBATCHES = 4


def grads_of(module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in module.parameters()]


def run_both() -> tuple:
    """Gradients of this rank's part, and the losses: torch's schedule on our modules, and our schedule on the module of
    torch's stage."""
    rank, inputs, targets = dist.get_rank(), *(torch.cat(each) for each in data(MICROBATCHES))
    part = layers(2)[rank]
    ops.attach_main_grad(part.parameters())
    stage = pipelining.PipelineStage(part, rank, 2, torch.device("cpu"))
    schedule = pipelining.Schedule1F1B(stage, MICROBATCHES, loss_fn=squared_error, scale_grads=False)
    losses: list[torch.Tensor] = []
    schedule.step(*((inputs,) if rank == 0 else ()), **({"target": targets, "losses": losses} if rank == 1 else {}))
    theirs = grads_of(part), [loss.item() for loss in losses]

    other = pipelining.PipelineStage(layers(2)[rank], rank, 2, torch.device("cpu"))
    with communicator(dist.group.WORLD, name="pp") as comm:
        mine = {rank: Stage(other.submod, loss=squared_error if rank == 1 else None)}
        plan = build("zb-h1", ranks=2, microbatches=MICROBATCHES)
        runtime = Runtime(plan, mine, comm, shape=(ROWS, WIDTH), dtype=torch.float32)
        found = runtime.step(*data(MICROBATCHES)).losses
    return theirs, (grads_of(other.submod), [loss.item() for loss in found])


def test_each_runs_the_stages_of_the_other(ranks):
    losses, twice = one_process(2, MICROBATCHES)  # of two steps, whose gradients have half of loss_scale 0.5 each
    for rank, both in enumerate(ranks(2).run(run_both)):
        for grads, found in both:
            assert found == ([loss.item() for loss in losses[:MICROBATCHES]] if rank == 1 else [])
            for ours, exact in zip(grads, twice[rank], strict=True):
                torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)
