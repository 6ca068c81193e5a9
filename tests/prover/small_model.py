"""A small language model, whole in plain torch and parallel by our layers, and the batch that it is proved on.

A bias on the keys, whose gradient is zero but for rounding, keyed dropout, and a norm: what has to be found right.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpmp_kernels.tensor_parallel import (
    ColumnParallelLinear,
    Dropout,
    DropoutKey,
    RowParallelLinear,
    VocabParallelEmbedding,
    column_linears,
    load_state_dict,
    vocab_parallel_cross_entropy,
)

VOCAB, HIDDEN, HEADS, WIDE, LAYERS, SEQUENCE, MICROBATCHES = 24, 16, 4, 24, 2, 4, 3
STEP = {"microbatches": MICROBATCHES}


def batch() -> tuple[Tensor, Tensor]:
    rows = torch.randint(0, VOCAB, (2 * MICROBATCHES, SEQUENCE + 1), generator=torch.Generator().manual_seed(3))
    return rows[:, :-1], rows[:, 1:]


class Kinds:
    """The modules that a model is made of, so that one of them can be a wrong one. comm is None: the whole model."""

    def __init__(self, comm=None, sequence_parallel: bool = False, **wrong):
        self.comm, self.wrong, self.sequence_parallel = comm, wrong, sequence_parallel
        self.how = {"sequence_parallel": True} if sequence_parallel else {}

    def _of(self, name: str, own):
        return self.wrong.get(name, own)

    def column(self, name: str, k: int, n: int, bias: bool = True) -> nn.Module:
        if self.comm is None:
            return nn.Linear(k, n, bias=bias)
        return self._of(name, ColumnParallelLinear)(k, n, self.comm, bias=bias, **self.how)

    def row(self, name: str, k: int, n: int) -> nn.Module:
        return (
            nn.Linear(k, n)
            if self.comm is None
            else self._of(name, RowParallelLinear)(k, n, self.comm, bias=True, **self.how)
        )

    def embedding(self) -> nn.Module:
        if self.comm is None:
            return nn.Embedding(VOCAB, HIDDEN)
        kind = self._of("embedding", VocabParallelEmbedding)
        return kind(VOCAB, HIDDEN, self.comm, padded_vocab=VOCAB, **self.how)

    def norm(self) -> nn.Module:
        return self._of("norm", Norm)(self.comm if self.sequence_parallel else None)

    def dropout(self, layer: int) -> nn.Module:
        return self._of("dropout", Drop)(layer, self.comm, self.sequence_parallel)


class Norm(nn.Module):
    def __init__(self, comm=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN))
        if comm is not None:
            self.weight.tp_partial_grad = comm.size

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


class Drop(nn.Module):
    """Keyed by the microbatch, which it counts."""

    def __init__(self, layer: int, comm=None, sequence_parallel: bool = False):
        super().__init__()
        self.layer, self.microbatch = layer, 0
        self.drop = Dropout(0.25, comm if sequence_parallel else None, sequence_parallel=sequence_parallel)

    def key(self) -> DropoutKey:
        self.microbatch += 1
        return DropoutKey(seed=1, step=0, layer=self.layer, microbatch=self.microbatch - 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x, self.key())


class Quiet(nn.Identity):
    """In place of dropout."""

    def __init__(self, *_):
        super().__init__()


class Attention(nn.Module):
    def __init__(self, kinds: Kinds):
        super().__init__()
        self.q, self.k, self.v = (kinds.column(name, HIDDEN, HIDDEN) for name in ("q", "k", "v"))
        self.out = kinds.row("out", HIDDEN, HIDDEN)
        self.together = "together" in kinds.wrong

    def projections(self, x: Tensor):
        if self.together:  # then no hook of theirs sees them
            return column_linears(x, [self.q, self.k, self.v])
        return self.q(x), self.k(x), self.v(x)

    def forward(self, x: Tensor) -> Tensor:
        size = HIDDEN // HEADS
        heads = (y.view(-1, SEQUENCE, y.shape[-1] // size, size).transpose(1, 2) for y in self.projections(x))
        y = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)
        return self.out(y if x.dim() == 3 else y.flatten(0, 1))


class MLP(nn.Module):
    def __init__(self, kinds: Kinds):
        super().__init__()
        self.up, self.down = kinds.column("up", HIDDEN, WIDE), kinds.row("down", WIDE, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Layer(nn.Module):
    def __init__(self, number: int, kinds: Kinds):
        super().__init__()
        self.norm1, self.attention, self.norm2 = kinds.norm(), Attention(kinds), kinds.norm()
        self.mlp, self.drop = MLP(kinds), kinds.dropout(number)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.drop(self.mlp(self.norm2(x)))


class Model(nn.Module):
    """tokens [B, S] -> logits [B, S, V], or their vocabulary shard; a stage of it: `layers` alone, and what is at the
    ends where it is at an end."""

    def __init__(self, kinds: Kinds | None = None, layers: range = range(LAYERS)):
        super().__init__()
        kinds = kinds or Kinds()
        self.embed = kinds.embedding() if layers.start == 0 else None
        self.layers = nn.ModuleDict({str(i): Layer(i, kinds) for i in layers})
        self.norm = kinds.norm() if layers.stop == LAYERS else None
        self.head = kinds.column("head", HIDDEN, VOCAB, bias=False) if layers.stop == LAYERS else None

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.embed is None else self.embed(x)
        for layer in self.layers.values():
            x = layer(x)
        return x if self.head is None else self.head(self.norm(x))


class Plain(Model):
    """Without dropout."""

    def __init__(self, kinds: Kinds | None = None, layers: range = range(LAYERS)):
        super().__init__(kinds or Kinds(dropout=Quiet), layers)


def parallel(module: nn.Module, comm, *, stage: int = 0, stages: int = 1, kind=Model, **wrong) -> nn.Module:
    """The plan: the model of our layers, or of the `wrong` ones, filled from the whole one."""
    layers = range(stage * LAYERS // stages, (stage + 1) * LAYERS // stages)
    made = kind(Kinds(comm, **wrong), layers).to(next(module.parameters()).dtype)
    state = module.state_dict()
    load_state_dict(made, {name: state[name] for name in made.state_dict()}, comm)
    return made


def sequence_parallel(module: nn.Module, comm, **wrong) -> nn.Module:
    return parallel(module, comm, sequence_parallel=True, **wrong)


def loss(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def parallel_loss(logits_shard_n: Tensor, target: Tensor, comm) -> Tensor:
    return vocab_parallel_cross_entropy(
        logits_shard_n.reshape(-1, logits_shard_n.shape[-1]), target.flatten(), comm
    ).mean()
