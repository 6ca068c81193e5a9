"""A GPT training step in DTensor tensor parallelism on gloo, two ranks with one thread each.

    python -m benchmarks.peers.dtensor_gpt                     starts its two ranks itself
    python -m benchmarks.peers.dtensor_gpt --backend tpmp      the same program on the backend of tpmp_kernels.comm
    python -m benchmarks.peers.dtensor_gpt --loss-parallel     logits stay sharded over the vocabulary
    torchrun --nproc-per-node 2 -m benchmarks.peers.dtensor_gpt

4 layers, hidden 512, 8 heads, MLP 2048, vocab 8192, batch 4 x 256, fp32, fused AdamW. The plan is the one of torch's
tensor-parallel tutorial: column-wise then row-wise linears, row-wise embedding, column-wise head.
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)

from benchmarks.peers import gpt, harness


def plan(*, sharded_logits: bool) -> dict:
    head = {"output_layouts": Shard(-1) if sharded_logits else Replicate(), "use_local_output": not sharded_logits}
    return {
        "tokens": RowwiseParallel(input_layouts=Replicate()),
        "blocks.*.attention.q": ColwiseParallel(),
        "blocks.*.attention.k": ColwiseParallel(),
        "blocks.*.attention.v": ColwiseParallel(),
        "blocks.*.attention.out": RowwiseParallel(),
        "blocks.*.up": ColwiseParallel(),
        "blocks.*.down": RowwiseParallel(),
        "head": ColwiseParallel(**head),
    }


def parameter_groups(model: torch.nn.Module) -> list[dict]:
    """Sharded and local parameters apart, because one fused optimizer call takes one kind of tensor."""
    parameters = list(model.parameters())
    kinds = [[p for p in parameters if isinstance(p, DTensor) == sharded] for sharded in (True, False)]
    return [{"params": kind} for kind in kinds if kind]


def train(args: argparse.Namespace) -> dict:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),), mesh_dim_names=("tp",))
    return harness.timed_steps(stepper(args, mesh), args)


def stepper(args: argparse.Namespace, mesh: DeviceMesh) -> Callable[[int], float]:
    """`step(i)` trains a model of its own on batch i, tensor parallel over `mesh`, and returns the loss."""
    config = harness.config_of(args)
    model = gpt.GPT(config, seed=args.seed)
    parallelize_module(model, mesh, plan(sharded_logits=args.loss_parallel))
    optimizer = harness.optimizer_of(parameter_groups(model), args)

    def step(i: int) -> float:
        tokens, targets = gpt.batch(config, args.batch, i, seed=args.seed)
        with loss_parallel() if args.loss_parallel else nullcontext():
            loss = gpt.mean_loss(model(tokens), targets)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return (loss.full_tensor() if isinstance(loss, DTensor) else loss).item()

    return step


def options() -> argparse.ArgumentParser:
    parser = harness.options(__doc__, layers=4, batch=4)
    parser.add_argument("--loss-parallel", action="store_true", help="cross entropy on logits sharded by vocabulary")
    parser.add_argument("--ranks", type=int, default=2, help="ranks to start where torchrun did not")
    return parser


def main() -> None:
    args = options().parse_args()
    result = harness.on_ranks(train, args, args.ranks)
    if result is not None:
        harness.report("dtensor_gpt", "loss_parallel" if args.loss_parallel else "replicated logits", result, args)


if __name__ == "__main__":
    harness.run_as_program(main)
