"""A GPT training step in torch.distributed.pipelining on gloo, two ranks with one thread each, any of its schedules.

    python -m benchmarks.peers.pipelining_gpt --schedule 1F1B        starts its two ranks itself
    python -m benchmarks.peers.pipelining_gpt --schedule all         one process, then every schedule
    python -m benchmarks.peers.pipelining_gpt --schedule none        one process that accumulates the microbatches
    torchrun --nproc-per-node 2 -m benchmarks.peers.pipelining_gpt --schedule GPipe

8 layers, hidden 512, 8 heads, MLP 2048, vocab 8192, batch 8 x 256 in 8 microbatches, fp32, fused AdamW. GPipe and
1F1B hold one stage a rank, the others two, placed in a loop or, for ZBV and DualPipeV, in a V. The loss of a step is
the mean over the batch: every microbatch's mean counts 1/8, in the gradients too. A schedule that cannot run is a row
that says why.
"""

import argparse
import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed import pipelining
from torch.distributed.pipelining import schedules

from benchmarks.peers import gpt, harness

# name on the command line: (class, stages a rank, placement)
SCHEDULES = {
    "GPipe": (schedules.ScheduleGPipe, 1, "loop"),
    "1F1B": (schedules.Schedule1F1B, 1, "loop"),
    "Interleaved1F1B": (schedules.ScheduleInterleaved1F1B, 2, "loop"),
    "LoopedBFS": (schedules.ScheduleLoopedBFS, 2, "loop"),
    "InterleavedZeroBubble": (schedules.ScheduleInterleavedZeroBubble, 2, "loop"),
    "ZBVZeroBubble": (schedules.ScheduleZBVZeroBubble, 2, "v"),
    "DualPipeV": (schedules.ScheduleDualPipeV, 2, "v"),
}


def stages_of(rank: int, ranks: int, per_rank: int, placement: str) -> list[int]:
    """Indices of the stages on `rank`: (0, 2), (1, 3) in a loop over two ranks, (0, 3), (1, 2) in a V."""
    if placement == "v":
        return [rank, 2 * ranks - 1 - rank]
    return [rank + turn * ranks for turn in range(per_rank)]


def build(args: argparse.Namespace):
    """This rank's part of the model and the schedule over it."""
    kind, per_rank, placement = SCHEDULES[args.schedule]
    config, rank, ranks = harness.config_of(args), dist.get_rank(), dist.get_world_size()
    count = ranks * per_rank
    if config.layers % count:
        raise ValueError(f"{config.layers} layers do not divide into {count} stages")
    size = config.layers // count
    indices = stages_of(rank, ranks, per_rank, placement)
    parts = [gpt.GPT(config, i * size, (i + 1) * size, seed=args.seed) for i in indices]
    stages = [
        pipelining.PipelineStage(part, i, count, torch.device("cpu")) for i, part in zip(indices, parts, strict=True)
    ]
    stage_or_stages = stages[0] if per_rank == 1 else stages
    # scale_grads divides the gradients, which add up over microbatches, by their number
    schedule = kind(stage_or_stages, args.microbatches, loss_fn=gpt.mean_loss, scale_grads=True)
    return torch.nn.ModuleList(parts), schedule, 0 in indices, count - 1 in indices


def train(args: argparse.Namespace) -> dict:
    """One rank of a pipeline."""
    return harness.timed_steps(stepper(args), args)


def stepper(args: argparse.Namespace) -> Callable[[int], float]:
    """`step(i)` trains a model of its own on batch i and returns the loss, NaN on ranks without the last stage."""
    parts, schedule, is_first, is_last = build(args)
    optimizer = harness.optimizer_of(parts.parameters(), args)

    def step(i: int) -> float:
        tokens, targets = gpt.batch(harness.config_of(args), args.batch, i, seed=args.seed)
        losses: list[torch.Tensor] = []
        inputs = (tokens,) if is_first else ()
        outputs = {"target": targets, "losses": losses} if is_last else {}
        schedule.step(*inputs, **outputs)
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack(losses).mean().item() if is_last else float("nan")

    return step


def train_alone(args: argparse.Namespace) -> dict:
    torch.set_num_threads(1)
    return harness.timed_steps(stepper_alone(args), args)


def stepper_alone(args: argparse.Namespace) -> Callable[[int], float]:
    """The whole model in this process, microbatch after microbatch: the work that a pipeline shares out."""
    config = harness.config_of(args)
    model = gpt.GPT(config, seed=args.seed)
    optimizer = harness.optimizer_of(model.parameters(), args)

    def step(i: int) -> float:
        total = 0.0
        whole = gpt.batch(config, args.batch, i, seed=args.seed)
        for tokens, targets in zip(*(each.chunk(args.microbatches) for each in whole), strict=True):
            loss = gpt.mean_loss(model(tokens), targets) / args.microbatches
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def run(name: str, args: argparse.Namespace) -> dict | None:
    args.schedule = name
    if name == "none":
        return train_alone(args) if os.environ.get("RANK", "0") == "0" else None
    if harness.under_torchrun():  # which ends every rank when one fails
        return harness.on_ranks(train, args, 2)
    try:
        return harness.on_ranks(train, args, 2)
    except Exception as error:
        return {"note": str(error).strip().splitlines()[-1]}


def main() -> None:
    parser = harness.options(__doc__, layers=8, batch=8)
    parser.add_argument("--schedule", choices=["none", *SCHEDULES, "all"], default="1F1B")
    parser.add_argument("--microbatches", type=int, default=8)
    args = parser.parse_args()
    if args.batch % args.microbatches:
        parser.error(f"--batch {args.batch} does not divide into {args.microbatches} microbatches of one size")
    for name in ["none", *SCHEDULES] if args.schedule == "all" else [args.schedule]:
        result = run(name, args)
        if result is not None:
            harness.report("pipelining_gpt", name, result, args)


if __name__ == "__main__":
    harness.run_as_program(main)
