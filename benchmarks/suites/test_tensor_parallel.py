"""A training step of benchmarks/peers/gpt.py's GPT on two ranks with one thread each, fp32 and AdamW: our layers,
DTensor, Megatron-Core, and plain torch (and our layers) in one process with one thread.

Every contender trains a model of its own that starts alike, on the same ranks, and they take turns; of one process rank
0 computes and the other waits. "one process, on each rank" is twice that work: both ranks step at once, each by itself,
so that half of its time is the least that any way to share a step can take on these two cores. Memory is what one rank
needs for parameters, gradients, optimizer state and activations at the peak of a step, each contender measured in
processes of its own.
"""

import argparse
import functools
import gc
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from benchmarks import parallel_gpt
from benchmarks.peers import dtensor_gpt, gpt, harness, megatron_layers
from benchmarks.pool import in_processes_of_their_own
from tpmp_kernels.bench import Bar, interleave, slowest
from tpmp_kernels.bench.comm import tpmp_group
from tpmp_kernels.bench.memory import extra_bytes
from tpmp_kernels.comm import SelfCommunicator, communicator

SUITE = "tensor_parallel"
CASE, PROGRAM = "GPT step 2 ranks", "4 layers, 4x256x512"
OURS, ALONE, EACH, OURS_ALONE = "tpmp", "one process", "one process, on each rank", "tpmp one process"
DTENSOR, DTENSOR_SHARDED, DTENSOR_OURS = "DTensor gloo", "DTensor gloo loss_parallel", "DTensor tpmp"
MEGATRON = "Megatron-Core gloo"

BARS = [
    Bar(CASE, PROGRAM, OURS, DTENSOR, 1 / 0.66),
    Bar(CASE, PROGRAM, OURS, MEGATRON, 1 / 0.8),
    Bar(CASE, PROGRAM, OURS, ALONE, 1.7),
    Bar(CASE, PROGRAM, OURS, ALONE, 1 / 0.58, quantity="memory"),
]

Step = Callable[[int], float]


def ours(args: argparse.Namespace) -> Step:
    return parallel_gpt.stepper(args, communicator(dist.group.WORLD, transport="shm", name="tp"))


def dtensor(args: argparse.Namespace, name: str, group: Callable, loss_parallel: bool = False) -> Step:
    # DTensor takes meshes of equal names and ranks for one, and with it the group of the first.
    mesh = DeviceMesh.from_group(group(), "cpu", mesh_dim_names=(f"tp_{name}",))
    return dtensor_gpt.stepper(argparse.Namespace(**vars(args) | {"loss_parallel": loss_parallel}), mesh)


def alone(args: argparse.Namespace, stepper: Callable[[argparse.Namespace], Step]) -> Step:
    return stepper(args) if dist.get_rank() == 0 else lambda i: float("nan")


def plain_torch(args: argparse.Namespace) -> Step:
    config = harness.config_of(args)
    model = gpt.GPT(config, seed=args.seed)
    optimizer = harness.optimizer_of(model.parameters(), args)

    def step(i: int) -> float:
        tokens, targets = gpt.batch(config, args.batch, i, seed=args.seed)
        loss = gpt.mean_loss(model(tokens), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


gloo = functools.partial(dist.new_group, backend="gloo")
CONTENDERS: dict[str, Callable[[argparse.Namespace], Step]] = {
    OURS: ours,
    DTENSOR: functools.partial(dtensor, name="gloo", group=gloo),
    DTENSOR_SHARDED: functools.partial(dtensor, name="sharded", group=gloo, loss_parallel=True),
    DTENSOR_OURS: functools.partial(dtensor, name="tpmp", group=tpmp_group),
    MEGATRON: megatron_layers.stepper,
    ALONE: functools.partial(alone, stepper=plain_torch),
    EACH: plain_torch,
    OURS_ALONE: functools.partial(alone, stepper=lambda args: parallel_gpt.stepper(args, SelfCommunicator())),
}


def test_step(compare):
    missing = {MEGATRON: megatron_layers.missing()} if megatron_layers.missing() else {}
    memory = {name: largest(in_processes_of_their_own(memory_of, name, [])) for name in present()}
    compare(
        lambda: slowest(in_processes_of_their_own(time_steps, [])) | missing,
        case=CASE,
        shape=PROGRAM,
        dtype="fp32",
        baseline=DTENSOR,
        threads=1,
        memory=memory,
    )


def present() -> list[str]:
    return [name for name in CONTENDERS if name != MEGATRON or not megatron_layers.missing()]


def largest(ranks: list[int | None]) -> int | None:
    return None if None in ranks else max(ranks)


def time_steps(options: list[str]) -> dict:
    """What each rank runs: the steps of all contenders in turn, once their first losses have been found to agree."""
    args = dtensor_gpt.options().parse_args(options)
    steps = {name: CONTENDERS[name](args) for name in present()}
    losses = {name: [step(i) for i in range(2)] for name, step in steps.items()}
    expected = losses[DTENSOR]
    for name, found in losses.items():
        if found != pytest.approx(expected, rel=1e-4) and not (name in (ALONE, OURS_ALONE) and dist.get_rank() > 0):
            raise AssertionError(f"{name}: the losses of the first steps are {found}, with {DTENSOR} {expected}")
    calls = {name: functools.partial(step, 2) for name, step in steps.items()}
    return interleave(calls, before=dist.barrier, rounds=args.steps, iterations=1, warmup=1)


def memory_of(name: str, options: list[str]) -> int | None:
    """Bytes of this rank's model, optimizer and, at the peak of a step, gradients and activations; None where the
    system does not tell."""
    args = dtensor_gpt.options().parse_args(options)
    before = tensor_bytes()
    step = CONTENDERS[name](args)
    step(0)  # the optimizer has its state only now
    kept = tensor_bytes() - before

    def next_step(_: torch.Tensor) -> tuple:
        step(1)
        return ()

    extra = extra_bytes(next_step, (torch.empty(0),))
    return None if extra is None else kept + extra


def tensor_bytes() -> int:
    """Bytes of all dense tensors that Python knows, those within DTensors among them."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
