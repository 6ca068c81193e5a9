"""The GPT of benchmarks/peers/gpt.py, its step under our pipeline runtime: what pipelining_gpt.py is against.

    python -m benchmarks.pipelined_gpt --schedule zb-v          starts its two ranks itself, on shm

The layers are our ops, the head's loss is fused, and the layers are cut where a model of their cost says so; `--even`
cuts them evenly, as pipelining_gpt.py does.
"""

import argparse
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.parallel_gpt import PLAN, vocab_parallel
from benchmarks.peers import gpt, harness
from tpmp_kernels.comm import Communicator, SelfCommunicator, communicator
from tpmp_kernels.pipeline.partition import LayerCost, partition
from tpmp_kernels.pipeline.runtime import Runtime
from tpmp_kernels.pipeline.schedules import SCHEDULES, build
from tpmp_kernels.pipeline.stage import Stage
from tpmp_kernels.tensor_parallel import parallelize


class Part(nn.Module):
    """Blocks first..last-1 in our ops, and at the end the head with its loss, whose gradient will be `scale`."""

    def __init__(self, config: gpt.Config, first: int, last: int, *, seed: int, scale: float):
        super().__init__()
        alone, self.scale = SelfCommunicator(), scale
        self.blocks = gpt.GPT(config, first, last, seed=seed)
        self.head = None
        if self.blocks.head is not None:
            self.head, self.blocks.head = vocab_parallel(self.blocks.head, alone), None
        here = {name: style for name, style in PLAN.items() if name != "tokens" or self.blocks.tokens is not None}
        parallelize(self.blocks, alone, here)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        return x if self.head is None else self.blocks.norm(x)

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return self.head.loss(hidden, targets, reduction="sum", grad_scale=self.scale)


def borders(config: gpt.Config, stages: int, placement: tuple[int, ...], even: bool) -> list[range]:
    """The blocks of each stage."""
    if even:
        return [range(i * config.layers // stages, (i + 1) * config.layers // stages) for i in range(stages)]
    weights = 4 * config.hidden**2 + 2 * config.hidden * config.mlp
    attention, head = config.sequence * config.hidden, config.vocab * config.hidden
    blocks = [
        LayerCost(str(i), weights + attention, weights + 5 / 2 * attention, weights) for i in range(config.layers)
    ]
    # The head makes its gradients along with the loss. It and the embedding stand with a block here.
    last = blocks[-1]
    blocks[-1] = LayerCost(last.name, last.F + 3 * head, last.B, last.W)
    return [part.layers for part in partition(blocks, ranks=max(placement) + 1, placement=placement).parts]


def stepper(args: argparse.Namespace, comm: Communicator) -> Callable[[int], float]:
    """`step(i)` trains a model of its own on batch i and returns the loss, NaN on ranks without the last stage."""
    config = harness.config_of(args)
    plan = build(args.schedule, ranks=comm.size, microbatches=args.microbatches)
    cuts = borders(config, plan.stages, plan.placement, args.even)
    scale = 1 / (args.batch * config.sequence)
    parts = {
        number: Part(config, cuts[number].start, cuts[number].stop, seed=args.seed, scale=scale)
        for number, rank in enumerate(plan.placement)
        if rank == comm.rank
    }
    stages = {number: Stage(part, loss=part.loss if part.head is not None else None) for number, part in parts.items()}
    shape = (args.batch // args.microbatches, config.sequence, config.hidden)
    runtime = Runtime(plan, stages, comm, shape=shape, dtype=torch.float32)
    optimizer = harness.optimizer_of([p for part in parts.values() for p in part.parameters()], args)

    def step(i: int) -> float:
        tokens, targets = gpt.batch(config, args.batch, i, seed=args.seed)
        chunks = (each.chunk(args.microbatches) for each in (tokens, targets))
        losses = runtime.step(*chunks, loss_scale=scale).losses
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack(losses).sum().item() * scale if losses else float("nan")

    return step


def train(args: argparse.Namespace) -> dict:
    with communicator(dist.group.WORLD, name="pp") as comm:
        return harness.timed_steps(stepper(args, comm), args)


def options() -> argparse.ArgumentParser:
    parser = harness.options(__doc__, layers=8, batch=8)
    known = [name for name in SCHEDULES if name != "forward-only"]
    parser.add_argument("--schedule", choices=known, default="1f1b")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--even", action="store_true", help="as many blocks on each stage")
    return parser


def main() -> None:
    args = options().parse_args()
    result = harness.on_ranks(train, args, 2)
    if result is not None:
        harness.report("pipelined_gpt", args.schedule, result, args)


if __name__ == "__main__":
    harness.run_as_program(main)
