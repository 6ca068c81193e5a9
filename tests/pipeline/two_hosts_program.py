"""What each of the two hosts of test_two_hosts.py runs: argv is rank, address of rank 0, microbatches and width.

Stages compute nothing to speak of and sleep for a set time instead: emulated, so that two cores show what two hosts do.
Rank 0 prints JSON: the losses, and of a step the exposed transfer, the makespan and the bytes of its messages.
"""

import json
import sys
import time

import torch
import torch.distributed as dist
from torch import nn

from tpmp_kernels.comm import communicator
from tpmp_kernels.pipeline.measured import measured
from tpmp_kernels.pipeline.runtime import Runtime
from tpmp_kernels.pipeline.schedules import build
from tpmp_kernels.pipeline.stage import Stage

FORWARD = 0.06  # seconds; a backward takes twice that
ROWS = 256


class Asleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        time.sleep(FORWARD)
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        time.sleep(2 * FORWARD)
        return grad * 2


class Block(nn.Module):
    def __init__(self, seed: int, width: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(width, generator=generator))

    def forward(self, x):
        return Asleep.apply(x * self.weight)


def mean_square(output, target):
    return (output - target).square().mean()


def data(microbatches: int, width: int):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(microbatches, ROWS, width, generator=generator).unbind() for _ in range(2)]


def main() -> None:
    rank, address, microbatches, width = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://{address}:29431", rank=rank, world_size=2)
    with communicator(dist.group.WORLD, transport="process_group", name="pp") as comm:
        plan = build("1f1b-eager", ranks=2, microbatches=microbatches)
        stages = {rank: Stage(Block(rank, width), loss=mean_square if rank == 1 else None)}
        runtime = Runtime(plan, stages, comm, shape=(ROWS, width), dtype=torch.float32, losses_everywhere=True)
        batch = data(microbatches, width)
        results = [runtime.step(*batch) for _ in range(2)]
        gathered: list = [None, None]
        dist.all_gather_object(gathered, results[-1].times)
        grad = [None, None]
        dist.all_gather_object(grad, stages[rank].module.weight.grad.double().sum().item())
    if rank == 0:
        took = measured(runtime.lowered, gathered)
        facts = {"exposed": took.exposed, "makespan": took.makespan, "bytes": 4 * ROWS * width, "gradients": grad}
        print(json.dumps({"losses": [loss.item() for loss in results[0].losses], **facts}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
