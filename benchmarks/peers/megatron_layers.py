"""A GPT training step from Megatron-Core's own tensor-parallel layers on gloo, two ranks with one thread each.

    python -m benchmarks.peers.megatron_layers                 starts its two ranks itself
    torchrun --nproc-per-node 2 -m benchmarks.peers.megatron_layers

The model, the sizes and the optimizer are those of dtensor_gpt.py. As Megatron does, q, k and v are one packed column
layer, so that their input gradient is reduced once, behind the weight gradient; logits stay sharded over the vocabulary
and go to its vocab-parallel cross entropy. Megatron-Core asks torch.cuda which device to use even on the CPU, and is
answered with the CPU. Without Megatron-Core the row says how to get it.
"""

import argparse
import importlib.util
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers import gpt, harness

VERSION = "0.16.1"
REMEDY = f"pip install --no-deps megatron-core=={VERSION} packaging"


def missing() -> str:
    """Why it cannot run here, or nothing."""
    return "" if importlib.util.find_spec("megatron") else f"Megatron-Core is not installed; {REMEDY}"


class Attention(nn.Module):
    def __init__(self, stock: gpt.Attention, layers: "Layers"):
        super().__init__()
        self.head_dim = stock.head_dim
        self.qkv = layers.column([stock.q, stock.k, stock.v])
        self.out = layers.row(stock.out)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)[0].unflatten(2, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))[0]


class Block(nn.Module):
    def __init__(self, stock: gpt.Block, layers: "Layers"):
        super().__init__()
        self.norm1, self.norm2 = stock.norm1, stock.norm2
        self.attention = Attention(stock.attention, layers)
        self.up, self.down = layers.column([stock.up]), layers.row(stock.down)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))[0]))[0]


class GPT(nn.Module):
    def __init__(self, stock: gpt.GPT, layers: "Layers"):
        super().__init__()
        self.tokens, self.positions = layers.embedding(stock.tokens), stock.positions
        self.blocks = nn.ModuleList(Block(block, layers) for block in stock.blocks)
        self.norm, self.head = stock.norm, layers.column([stock.head])

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))[0]


class Layers:
    """Megatron-Core's layers with this rank's part of a stock layer's weights in them."""

    def __init__(self):
        torch.cuda.current_device = lambda: torch.device("cpu")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on what else could be installed beside it
            from megatron.core import ModelParallelConfig, parallel_state, tensor_parallel
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(dist.get_world_size())
        self.core, self.rank, self.ranks = tensor_parallel, dist.get_rank(), dist.get_world_size()
        config = ModelParallelConfig(use_cpu_initialization=True, perform_initialization=False)
        self.how = {"config": config, "init_method": nn.init.zeros_}

    def column(self, stock: list[nn.Linear]) -> nn.Module:
        """The stock layers packed into one: of this rank its part of each."""
        bias = stock[0].bias is not None
        size = (stock[0].in_features, sum(layer.out_features for layer in stock))
        layer = self.core.ColumnParallelLinear(*size, bias=bias, gather_output=False, **self.how)
        for name in ("weight", "bias") if bias else ("weight",):
            parts = [getattr(each, name).chunk(self.ranks)[self.rank] for each in stock]
            getattr(layer, name).data.copy_(torch.cat(parts))
        return layer

    def row(self, stock: nn.Linear) -> nn.Module:
        size = (stock.in_features, stock.out_features)
        layer = self.core.RowParallelLinear(*size, bias=True, input_is_parallel=True, skip_bias_add=False, **self.how)
        layer.weight.data.copy_(stock.weight.chunk(self.ranks, dim=1)[self.rank])
        layer.bias.data.copy_(stock.bias)
        return layer

    def embedding(self, stock: nn.Embedding) -> nn.Module:
        layer = self.core.VocabParallelEmbedding(stock.num_embeddings, stock.embedding_dim, **self.how)
        layer.weight.data.copy_(stock.weight.chunk(self.ranks)[self.rank])
        return layer


def train(args: argparse.Namespace) -> dict:
    return harness.timed_steps(stepper(args), args)


def stepper(args: argparse.Namespace) -> Callable[[int], float]:
    """`step(i)` trains a model of its own on batch i, tensor parallel over all ranks, and returns the loss."""
    config, layers = harness.config_of(args), Layers()
    model = GPT(gpt.GPT(config, seed=args.seed), layers)
    optimizer = harness.optimizer_of(model.parameters(), args)

    def step(i: int) -> float:
        tokens, targets = gpt.batch(config, args.batch, i, seed=args.seed)
        loss = layers.core.vocab_parallel_cross_entropy(model(tokens), targets).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def options() -> argparse.ArgumentParser:
    parser = harness.options(__doc__, layers=4, batch=4)
    parser.add_argument("--ranks", type=int, default=2, help="ranks to start where torchrun did not")
    return parser


def main() -> None:
    args = options().parse_args()
    result = {"note": missing()} if missing() else harness.on_ranks(train, args, args.ranks)
    if result is not None:
        harness.report("megatron_layers", "sharded logits", result, args)


if __name__ == "__main__":
    harness.run_as_program(main)
