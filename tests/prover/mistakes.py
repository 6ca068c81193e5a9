"""Mistakes that users of tensor and pipeline parallelism make, each in a layer, a loss or a step of its own."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from small_model import MICROBATCHES, Drop, Kinds, Model, Norm, batch, parallel, parallel_loss
from torch import Tensor, nn

from tpmp_kernels import ops
from tpmp_kernels.comm import autograd
from tpmp_kernels.tensor_parallel import (
    ColumnParallelLinear,
    Dropout,
    RowParallelLinear,
    VocabParallelEmbedding,
    column_linears,
    load_state_dict,
    reduce_partial_gradients,
)


class ForgetsReduction(RowParallelLinear):
    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class ReducesTwice(RowParallelLinear):
    def forward(self, x: Tensor) -> Tensor:
        y = autograd.all_reduce(ops.linear(x, self.weight), self.comm, tag="once")
        return autograd.all_reduce(y, self.comm, tag="twice") + self.bias


class AddsBiasOnEveryRank(RowParallelLinear):
    def forward(self, x: Tensor) -> Tensor:
        return autograd.all_reduce(ops.linear(x, self.weight, self.bias), self.comm, tag="row")


class ForgetsBackwardReduction(ColumnParallelLinear):
    """Right in forward: what is missing is the sum of dX."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class OnlyMicrobatch2(RowParallelLinear):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * (1.5 if self.calls == 3 else 1.0)


class OnlyRank1(RowParallelLinear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (5.0 if self.comm.rank == 1 else 1.0)


class Activates(ColumnParallelLinear):
    """What no layer of the reference does."""

    def __init__(self, *size, **options):
        super().__init__(*size, **options, activation="relu")


class NormLocalGradient(Norm):
    """Its gradient is that of this rank's tokens, and nobody adds them."""

    def __init__(self, comm=None):
        super().__init__()


class SameMaskEverywhere(Drop):
    """Each rank drops what the first one drops, though it has other tokens."""

    def __init__(self, layer: int, comm=None, sequence_parallel: bool = False):
        super().__init__(layer)
        self.drop = Dropout(0.25)


class VocabOffByOne(VocabParallelEmbedding):
    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.weight.shape[0]
        start = self.comm.rank * rows + 1
        foreign = (tokens < start) | (tokens >= start + rows)
        found = F.embedding((tokens - start).masked_fill(foreign, 0), self.weight).masked_fill(foreign.unsqueeze(-1), 0)
        return autograd.all_reduce(found, self.comm, tag="embedding")


class GathersLogits(ColumnParallelLinear):
    def __init__(self, *size, **options):
        super().__init__(*size, **options, gather_output=True)


def transposed(module: nn.Module, comm, **options) -> nn.Module:
    """The square weight of a row layer, cut along the wrong dimension and turned so that it fits."""
    made = parallel(module, comm, **options)
    whole = module.layers["1"].attention.out.weight
    made.layers["1"].attention.out.weight.data = whole.detach().chunk(comm.size, 0)[comm.rank].t().contiguous()
    return made


def swapped(module: nn.Module, comm, **options) -> nn.Module:
    """Rank r takes the shard of rank r + 1."""
    made = parallel(module, comm, **options)
    whole = module.layers["0"].mlp.up.weight
    made.layers["0"].mlp.up.weight.data = whole.detach().chunk(comm.size, 0)[(comm.rank + 1) % comm.size].clone()
    return made


def without_a_layer(module: nn.Module, comm, *, stage: int, stages: int) -> nn.Module:
    """The second stage begins one too late, and nothing says so."""
    made = parallel(module, comm, stage=stage, stages=stages)
    if stage == 1:
        made.layers = nn.ModuleDict()
    return made


class GivesTheOther(Model):
    """A stage that hands on, for each of two microbatches, the other one: after a bug in a schedule's buffers."""

    def __init__(self, kinds, layers):
        super().__init__(kinds, layers)
        self.tokens = batch()[0].chunk(2)

    def forward(self, x: Tensor) -> Tensor:
        if self.embed is not None:
            x = self.tokens[1] if torch.equal(x, self.tokens[0]) else self.tokens[0]
        return super().forward(x)


def swapped_microbatches(module: nn.Module, comm, **stage) -> nn.Module:
    return parallel(module, comm, kind=GivesTheOther, **stage)


def local_mean(logits_shard_n: Tensor, target: Tensor, comm) -> Tensor:
    """Each rank takes the mean over its own tokens; the means are added."""
    logits = autograd.all_gather(logits_shard_n, comm, dim=-1, tag="logits").flatten(0, 1)
    own = F.cross_entropy(logits.chunk(comm.size)[comm.rank], target.flatten().chunk(comm.size)[comm.rank])
    return autograd.all_reduce(own, comm, tag="loss")


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad / MICROBATCHES


def scaled_twice(logits_shard_n: Tensor, target: Tensor, comm) -> Tensor:
    """The gradient of a microbatch is divided by their number here, and by the runtime."""
    return _ScaledGradient.apply(parallel_loss(logits_shard_n, target, comm))


class Fresh(Model):
    """Its biases are zeros, as in many a fresh model."""

    def __init__(self, kinds: Kinds | None = None, layers: range = range(2)):
        super().__init__(kinds, layers)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)


class Shared(nn.Module):
    """The columns of k are the same on all ranks, of which each reads its half; they are called by column_linears."""

    def __init__(self, comm=None):
        super().__init__()
        self.comm = comm
        if comm is None:
            self.k, self.end = nn.Linear(8, 4), nn.Linear(4, 8)
        else:
            self.k = ColumnParallelLinear(8, 4, comm, bias=True, replicas=comm.size)
            self.end = ReducesTwice(4, 8, comm, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.comm is None:
            return self.end(self.k(x))
        (y,) = column_linears(x, [self.k])
        return self.end(y.chunk(self.comm.size, -1)[self.comm.rank])


def shared(module: nn.Module, comm) -> nn.Module:
    made = Shared(comm).to(next(module.parameters()).dtype)
    load_state_dict(made, module.state_dict(), comm)
    return made


class Tied(Model):
    """The head's weight is the embedding's."""

    def __init__(self, kinds: Kinds | None = None, layers: range = range(2)):
        super().__init__(kinds, layers)
        if kinds is None or "copies" not in kinds.wrong:
            self.head.weight = self.embed.weight


def tied(module: nn.Module, comm, **wrong) -> nn.Module:
    return parallel(module, comm, kind=Tied, **wrong)


def add_copies(module: nn.Module, comm) -> None:
    """The gradients of both copies are added, as they should be, but the optimizer knows the first alone."""
    reduce_partial_gradients(module, comm)
    module.embed.weight.grad += module.head.weight.grad
    module.head.weight.grad = None


class ForgetsMicrobatches(Norm):
    """Throws away what earlier microbatches have added to its gradient."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.grad = None
        return super().forward(x)


class Drifts(torch.optim.SGD):
    """On rank 1 the update of a whole parameter is a unit in the last place off."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.1)

    @torch.no_grad()
    def step(self) -> None:
        super().step()
        if dist.is_initialized() and dist.get_rank() == 1:
            norm = self.param_groups[0]["params"][-2]
            norm.copy_(norm.nextafter(norm + 1))
