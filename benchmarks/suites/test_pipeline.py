"""A training step of benchmarks/peers/gpt.py's GPT as a pipeline of two ranks with one thread each, fp32 and AdamW:
our runtime under several schedules, every schedule of torch.distributed.pipelining on gloo, and plain torch in one
process with one thread.

Every contender trains a model of its own that starts alike, on the same ranks, and they take turns; of one process
rank 0 computes and the other waits. "one process, on each rank" is twice that work: both ranks step at once, each by
itself, so that half of its time is the least that any way to share a step can take on these two cores.
"""

import argparse
import functools
from collections.abc import Callable

import pytest
import torch.distributed as dist

from benchmarks import pipelined_gpt
from benchmarks.peers import pipelining_gpt
from benchmarks.pool import in_processes_of_their_own
from tpmp_kernels.bench import Bar, interleave, slowest
from tpmp_kernels.comm import communicator

SUITE = "pipeline"
CASE, PROGRAM = "GPT step 2 stages", "8 layers, 8x256x512, 8 microbatches"
ALONE, EACH = "one process", "one process, on each rank"
OURS = ["1f1b", "1f1b-eager", "zb-h1", "interleaved-1f1b", "zb-v"]
BEST = "tpmp zb-h1"

BARS = [
    Bar(CASE, PROGRAM, BEST, "torch GPipe", 1 / 0.85),
    *(Bar(CASE, PROGRAM, BEST, f"torch {name}", 1 / 0.77) for name in pipelining_gpt.SCHEDULES if name != "GPipe"),
]

Step = Callable[[int], float]


def ours(args: argparse.Namespace, schedule: str, even: bool = False) -> Step:
    comm = communicator(dist.group.WORLD, transport="shm", name=f"pp {schedule} {even}")
    return pipelined_gpt.stepper(argparse.Namespace(**{**vars(args), "schedule": schedule, "even": even}), comm)


def torchs(args: argparse.Namespace, schedule: str) -> Step:
    return pipelining_gpt.stepper(argparse.Namespace(**{**vars(args), "schedule": schedule}))


def alone(args: argparse.Namespace) -> Step:
    return pipelining_gpt.stepper_alone(args) if dist.get_rank() == 0 else lambda i: float("nan")


CONTENDERS: dict[str, Callable[[argparse.Namespace], Step]] = {
    **{f"tpmp {name}": functools.partial(ours, schedule=name) for name in OURS},
    "tpmp 1f1b, even stages": functools.partial(ours, schedule="1f1b", even=True),
    **{f"torch {name}": functools.partial(torchs, schedule=name) for name in pipelining_gpt.SCHEDULES},
    ALONE: alone,
    EACH: pipelining_gpt.stepper_alone,
}


def test_step(compare):
    compare(
        lambda: slowest(in_processes_of_their_own(time_steps, [])),
        case=CASE,
        shape=PROGRAM,
        dtype="fp32",
        baseline="torch 1F1B",
        threads=1,
    )


def time_steps(options: list[str]) -> dict:
    """What each rank runs: the steps of all contenders in turn, once their first losses have been found to agree."""
    args = pipelined_gpt.options().parse_args(["--steps", "5", *options])
    steps = {name: make(args) for name, make in CONTENDERS.items()}
    losses = {name: [step(i) for i in range(2)] for name, step in steps.items()}
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, losses)
    for name in CONTENDERS:
        held = [each[name] for each in everywhere if each[name][0] == each[name][0]]  # not NaN
        if held[0] != pytest.approx(everywhere[0][ALONE], rel=1e-4):
            raise AssertionError(f"{name}: the losses of the first steps are {held[0]}, alone {everywhere[0][ALONE]}")
    calls = {name: functools.partial(step, 2) for name, step in steps.items()}
    return interleave(calls, before=dist.barrier, rounds=args.steps, iterations=1, warmup=1)
