"""The GPT that the peer programs train, in plain torch: pre-norm, learned positions, GELU, causal attention.

q, k and v are three projections, because a packed one cannot be cut by heads with a column-wise plan. A model may hold
a range of the layers only, which is what a pipeline stage is; the parameters of a layer follow from (seed, layer) and
not from which rank builds it, so every layout starts from the same model.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    layers: int
    hidden: int = 512
    heads: int = 8
    mlp: int = 2048
    vocab: int = 8192
    sequence: int = 256


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.head_dim = config.hidden // config.heads
        self.q, self.k, self.v, self.out = (nn.Linear(config.hidden, config.hidden) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._heads(project(x)) for project in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """[B, S, H] -> [B, heads, S, head_dim], with as many heads as x holds: a shard has a part of them."""
        return x.unflatten(2, (-1, self.head_dim)).transpose(1, 2)


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.hidden), nn.LayerNorm(config.hidden)
        self.attention = Attention(config)
        self.up, self.down = nn.Linear(config.hidden, config.mlp), nn.Linear(config.mlp, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Layers `first` to `last` (exclusive): with the embedding if first is 0, with the head if last is the end."""

    def __init__(self, config: Config, first: int = 0, last: int | None = None, *, seed: int = 0):
        super().__init__()
        last = config.layers if last is None else last
        self.tokens = self.positions = self.norm = self.head = None
        if first == 0:
            self.tokens = _seeded(seed, -1, lambda: nn.Embedding(config.vocab, config.hidden))
            self.positions = _seeded(seed, -2, lambda: nn.Embedding(config.sequence, config.hidden))
        self.blocks = nn.ModuleList(_seeded(seed, i, lambda: Block(config)) for i in range(first, last))
        if last == config.layers:
            self.norm = nn.LayerNorm(config.hidden)
            self.head = _seeded(seed, -3, lambda: nn.Linear(config.hidden, config.vocab, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """tokens [B, S] or activations [B, S, H] -> activations, or logits [B, S, vocab] from the last stage."""
        if self.tokens is not None:
            x = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            x = block(x)
        return x if self.head is None else self.head(self.norm(x))


def _seeded(seed: int, part: int, build):
    """Build a part of the model from a generator state of its own; embeddings get GPT-2's small scale."""
    torch.manual_seed(1000 * seed + part + 10)
    module = build()
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    return module


def batch(config: Config, size: int, step: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random tokens and targets, each [size, sequence]; the same on every rank."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)
    drawn = torch.randint(config.vocab, (size, config.sequence + 1), generator=generator)
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy averaged over every token of the (micro)batch."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
