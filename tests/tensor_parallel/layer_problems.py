"""Tensor-parallel layers as data: each beside the same layer unsharded, and how its tensors are cut over ranks.

A layer is built on every rank with its shard of the whole parameters, fed its shard of the whole x and dy, and what it
gives is compared with the same shard of what the whole layer gives: outputs, dx, and the gradient of every parameter.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpmp_kernels import reference
from tpmp_kernels.comm import Communicator, autograd
from tpmp_kernels.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
    column_linears,
    gate_and_up,
)

HIDDEN, WIDE, HEAD = 16, 24, 3
KV_HEADS = 2  # on four ranks, two share one
VOCAB, PADDED = 41, 64  # with four ranks the last holds padding alone
TOKENS = 24


def whole(t: Tensor, comm: Communicator, sequence_parallel: bool) -> Tensor:
    """A tensor that every rank holds."""
    return t


def columns(t: Tensor, comm: Communicator, sequence_parallel: bool) -> Tensor:
    return t.chunk(comm.size, -1)[comm.rank]


def shared_columns(t: Tensor, comm: Communicator, sequence_parallel: bool) -> Tensor:
    return t.chunk(KV_HEADS, -1)[comm.rank * KV_HEADS // comm.size]


def between(t: Tensor, comm: Communicator, sequence_parallel: bool) -> Tensor:
    """What lies between a pair of layers: whole, or this rank's tokens."""
    return t.chunk(comm.size)[comm.rank] if sequence_parallel else t


def padded_columns(t: Tensor, comm: Communicator, sequence_parallel: bool) -> Tensor:
    return columns(F.pad(t, (0, PADDED - VOCAB), value=-torch.inf), comm, sequence_parallel)


@dataclass(frozen=True)
class Layer:
    """build(comm, **how) -> module; run(module, x) and unsharded(parameters, x) -> a tuple of outputs.

    shapes: of the whole parameters. x, outputs: how they are cut. exact: on small integers in fp64 every sum is exact.
    slack: how far an output may be below the terms that it is a difference of.
    """

    shapes: dict[str, tuple[int, ...]]
    build: Callable[..., nn.Module]
    run: Callable[[nn.Module, Tensor], tuple[Tensor, ...]]
    unsharded: Callable[[dict[str, Tensor], Tensor], tuple[Tensor, ...]]
    x: Callable = between
    outputs: tuple[Callable, ...] = (columns,)
    ids: bool = False
    features: int = HIDDEN
    exact: bool = True
    slack: int = 1


def column(activation=None, bias=False, gather=False, copied=False) -> Layer:
    def build(comm, **how):
        options = {"bias": bias, "activation": activation, "gather_output": gather, "input_is_copied": copied}
        return ColumnParallelLinear(HIDDEN, WIDE, comm, **options, **how)

    def run(module, x):
        if copied:
            enter = autograd.all_gather if module.sequence_parallel else autograd.copy
            x = enter(x, module.comm, tag="test")
        return (module(x),)

    return Layer(
        {"weight": (WIDE, HIDDEN)} | ({"bias": (WIDE,)} if bias else {}),
        build,
        run,
        lambda p, x: (reference.linear(x, p["weight"], p.get("bias"), activation=activation),),
        outputs=(whole if gather else columns,),
        exact=activation in (None, "relu"),
    )


def row(bias=False, parallel=True) -> Layer:
    return Layer(
        {"weight": (HIDDEN, WIDE)} | ({"bias": (HIDDEN,)} if bias else {}),
        lambda comm, **how: RowParallelLinear(WIDE, HIDDEN, comm, bias=bias, input_is_parallel=parallel, **how),
        lambda module, x: (module(x),),
        lambda p, x: (F.linear(x, p["weight"], p.get("bias")),),
        x=columns if parallel else whole,
        outputs=(between,),
        features=WIDE,
    )


def query_key_value(bias=False) -> Layer:
    widths = {"q": 4 * HEAD, "k": KV_HEADS * HEAD, "v": KV_HEADS * HEAD}

    def build(comm, **how):
        replicas = {"k": max(1, comm.size // KV_HEADS), "v": max(1, comm.size // KV_HEADS)}
        return nn.ModuleDict(
            {
                name: ColumnParallelLinear(HIDDEN, width, comm, bias=bias, replicas=replicas.get(name, 1), **how)
                for name, width in widths.items()
            }
        )

    shapes = {f"{name}.weight": (width, HIDDEN) for name, width in widths.items()}
    return Layer(
        shapes | ({f"{name}.bias": (width,) for name, width in widths.items()} if bias else {}),
        build,
        lambda module, x: column_linears(x, list(module.values())),
        lambda p, x: tuple(F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias")) for name in widths),
        outputs=(columns, shared_columns, shared_columns),
    )


def mlp(activation: str, down: bool) -> Layer:
    def build(comm, **how):
        layers = {name: ColumnParallelLinear(HIDDEN, WIDE, comm, **how) for name in ("gate", "up")}
        return nn.ModuleDict(layers | ({"down": RowParallelLinear(WIDE, HIDDEN, comm, **how)} if down else {}))

    def run(module, x):
        y = gate_and_up(x, module["gate"], module["up"], activation=activation)
        return (module["down"](y) if down else y,)

    def unsharded(p, x):
        y = reference.gated_linear(x, p["gate.weight"], p["up.weight"], activation=activation)
        return (F.linear(y, p["down.weight"]) if down else y,)

    shapes = {"gate.weight": (WIDE, HIDDEN), "up.weight": (WIDE, HIDDEN)}
    return Layer(
        shapes | ({"down.weight": (HIDDEN, WIDE)} if down else {}),
        build,
        run,
        unsharded,
        outputs=(between if down else columns,),
        exact=False,
    )


def embedding() -> Layer:
    return Layer(
        {"weight": (VOCAB, HIDDEN)},
        lambda comm, **how: VocabParallelEmbedding(VOCAB, HIDDEN, comm, **how),
        lambda module, x: (module(x),),
        lambda p, x: (F.embedding(x, p["weight"]),),
        x=whole,
        outputs=(between,),
        ids=True,
    )


def head() -> Layer:
    return Layer(
        {"weight": (VOCAB, HIDDEN)},
        lambda comm, **how: VocabParallelHead(HIDDEN, VOCAB, comm, **how),
        lambda module, x: (module(x),),
        lambda p, x: (F.linear(x, p["weight"]),),
        outputs=(padded_columns,),
    )


def targets() -> Tensor:
    return torch.randint(0, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(3))


def loss(tied: bool) -> Layer:
    """The loss of every token; tied: behind the embedding of x, with its weight."""

    def build(comm, **how):
        if not tied:
            return VocabParallelHead(HIDDEN, VOCAB, comm, **how)
        embed = VocabParallelEmbedding(VOCAB, HIDDEN, comm, **how)
        layer = VocabParallelHead(HIDDEN, VOCAB, comm, weight=embed.weight, **how)
        return nn.ModuleDict({"embed": embed, "head": layer})

    def run(module, x):
        layer, x = (module["head"], module["embed"](x)) if tied else (module, x)
        return (layer.loss(x, targets(), reduction="none").flatten(),)

    def unsharded(p, x):
        (weight,) = p.values()
        x = F.embedding(x, weight) if tied else x
        logits = F.linear(x, weight).flatten(0, -2)
        return (F.cross_entropy(logits.to(torch.promote_types(x.dtype, torch.float32)), targets(), reduction="none"),)

    return Layer(
        {"embed.weight" if tied else "weight": (VOCAB, HIDDEN)},
        build,
        run,
        unsharded,
        x=whole if tied else between,
        outputs=(whole,),
        ids=tied,
        exact=False,
        slack=16,  # logits of up to 50, whose difference is the loss
    )


LAYERS = {
    "column": column(),
    "column, bias, relu": column("relu", bias=True),
    "column, bias, gelu": column("gelu", bias=True),
    "column, silu": column("silu"),
    "column, bias, gathered": column(bias=True, gather=True),
    "column, relu, gathered": column("relu", gather=True),
    "column behind a copy": column("relu", bias=True, copied=True),
    "row": row(),
    "row, bias": row(bias=True),
    "row, bias, of a whole x": row(bias=True, parallel=False),
    "q, k, v": query_key_value(),
    "q, k, v, bias": query_key_value(bias=True),
    "gate and up, silu": mlp("silu", down=False),
    "gate and up, gelu_tanh": mlp("gelu_tanh", down=False),
    "mlp": mlp("silu", down=True),
    "embedding": embedding(),
    "head": head(),
    "loss": loss(tied=False),
    "loss, tied": loss(tied=True),
}
