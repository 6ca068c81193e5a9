"""The GPT of benchmarks/peers/gpt.py, its step in our layers: what dtensor_gpt.py and megatron_layers.py are against.

    python -m benchmarks.parallel_gpt           starts its two ranks itself; shm, whatever torch.distributed runs on
    python -m benchmarks.parallel_gpt --ranks 1

`parallelize` makes the stock model tensor parallel by the same plan as in dtensor_gpt.py; its head becomes a
VocabParallelHead, whose loss takes the hidden states.
"""

import argparse
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.peers import gpt, harness
from tpmp_kernels.comm import Communicator, communicator
from tpmp_kernels.tensor_parallel import VocabParallelHead, parallelize, shard_of

PLAN = {
    "tokens": "embedding_rowwise",
    "blocks.*.attention.[qkv]": "colwise",
    "blocks.*.attention.out": "rowwise",
    "blocks.*.up": "colwise",
    "blocks.*.down": "rowwise",
}


def train(args: argparse.Namespace) -> dict:
    with communicator(dist.group.WORLD, name="tp") as comm:
        return harness.timed_steps(stepper(args, comm), args)


def stepper(args: argparse.Namespace, comm: Communicator) -> Callable[[int], float]:
    """`step(i)` trains a model of its own on batch i, tensor parallel over `comm`, and returns the loss."""
    config = harness.config_of(args)
    model = gpt.GPT(config, seed=args.seed)
    head, model.head = vocab_parallel(model.head, comm), None
    parallelize(model, comm, PLAN)
    optimizer = harness.optimizer_of([*model.parameters(), *head.parameters()], args)

    def step(i: int) -> float:
        tokens, targets = gpt.batch(config, args.batch, i, seed=args.seed)
        loss = head.loss(model.norm(model(tokens)), targets, grad_scale=1.0)  # its gradient is known: see ops
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def vocab_parallel(stock: nn.Linear, comm: Communicator) -> VocabParallelHead:
    vocab = stock.out_features
    head = VocabParallelHead(stock.in_features, vocab, comm, padded_vocab=vocab, dtype=stock.weight.dtype)
    with torch.no_grad():
        head.weight.copy_(shard_of(stock.weight, head.weight, comm))
    return head


def options() -> argparse.ArgumentParser:
    parser = harness.options(__doc__, layers=4, batch=4)
    parser.add_argument("--ranks", type=int, default=2, help="ranks to start where torchrun did not")
    return parser


def main() -> None:
    args = options().parse_args()
    result = harness.on_ranks(train, args, args.ranks)
    if result is not None:
        harness.report("parallel_gpt", "stock model, parallelized", result, args)


if __name__ == "__main__":
    harness.run_as_program(main)
