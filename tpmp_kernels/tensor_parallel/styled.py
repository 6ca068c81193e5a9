"""What a style makes of a stock nn.Linear or nn.Embedding: our layers, between the layouts that the style declares.

A stock module becomes one of them in place, by a change of its class: whoever holds the module goes on holding it, and
its name, its hooks and the keys of its state_dict stay.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Partial, Placement, Replicate, Shard

from tpmp_kernels import ops
from tpmp_kernels.comm import Communicator, autograd
from tpmp_kernels.tensor_parallel.copies import autocast_dtype, copied
from tpmp_kernels.tensor_parallel.embedding import VocabParallelEmbedding
from tpmp_kernels.tensor_parallel.layouts import Group, enter, enter_whole, leave, redistribute
from tpmp_kernels.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from tpmp_kernels.tensor_parallel.shard import ShardedModule, replicas_of, shard_parameter
from tpmp_kernels.tensor_parallel.vocabulary import own_ids


class _Laid:
    """Where the tensors of a layer lie: as it gets them, as it gives them, and whether it gives plain ones."""

    def lay(self, name: str, group: Group, source: Placement, target: Placement, local: bool, defers: bool):
        self.name, self.group, self.source, self.target = name, group, source, target
        self.local, self.defers = local, defers
        return self

    def _enter(self, x: Tensor, wanted: Placement) -> Tensor:
        return enter(x, self.source, wanted, self.group, tag=f"{self.name}.input")

    def _leave(self, y: Tensor, source: Placement) -> Tensor:
        return leave(y, source, self.target, self.group, local=self.local, tag=f"{self.name}.output")


class StyledColumn(_Laid, ColumnParallelLinear):
    """ColumnParallelLinear with any layout in front and behind; `shares` is the copy that it has in common with other
    column layers of its parent."""

    shares: "SharedCopy | None" = None

    def forward(self, x: Tensor) -> Tensor:
        x, summed = enter_whole(x, self.source, self.group, tag=f"{self.name}.input")
        weight, bias, tap = self.weight, self.bias, None
        if summed or self.comm.size == 1 or not (torch.is_grad_enabled() and x.requires_grad):
            weight, bias = self.added()
        elif self.shares is not None:
            x, tap = self.shares(self, x)
        else:
            x, (tap,) = copied(x, self.comm, [self.added()], tag=f"{self.name}.input")
        return self._leave(ops.linear(x, weight, bias, activation=self.activation, tap=tap), Shard(-1))

    def added(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias; their gradients are added over neighbours that hold the same, unless that is deferred."""
        replicas = 1 if self.defers else replicas_of(self.weight)
        if replicas == 1:
            return self.weight, self.bias
        return tuple(
            p if p is None else copy_in_blocks(p, self.comm, replicas, tag=f"{self.name}.{key}")
            for key, p in (("weight", self.weight), ("bias", self.bias))
        )


class StyledRow(_Laid, RowParallelLinear):
    """RowParallelLinear with any layout in front and behind."""

    def forward(self, x: Tensor) -> Tensor:
        y = ops.linear(self._enter(x, Shard(-1)), self.weight)
        y = redistribute(y, Partial(), self.target, self.comm, tag=f"{self.name}.output")
        return self._leave(y if self.bias is None else y + self._bias(y), self.target)

    def _bias(self, y: Tensor) -> Tensor:
        if self.target.is_replicate():
            return self.bias
        bias = self.bias if self.defers else autograd.copy(self.bias, self.comm, tag=f"{self.name}.bias")
        cut = self.target.dim in (-1, y.dim() - 1)
        return bias.chunk(self.comm.size)[self.comm.rank] if cut else bias


class StyledVocabEmbedding(_Laid, VocabParallelEmbedding):
    """VocabParallelEmbedding with any layout in front and behind, and with nn.Embedding's padding_idx."""

    padding_idx: int | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self._enter(tokens, Replicate())
        ids = own_ids(self.weight, self.comm)
        foreign = (tokens < ids.start) | (tokens >= ids.stop)
        padding = self.padding_idx - ids.start if self.padding_idx in ids else None
        found = F.embedding((tokens - ids.start).masked_fill(foreign, 0), self.weight, padding)
        return self._leave(found.masked_fill(foreign.unsqueeze(-1), 0), Partial())


class StyledColumnEmbedding(_Laid, ShardedModule):
    """tokens [..] (int64) -> [.., H/R]; weight [V, H/R]: this rank's columns of every row."""

    padding_idx: int | None = None

    def __init__(self, vocab_size: int, hidden: int, comm: Communicator, *, dtype=None, device=None):
        super().__init__()
        self.comm = comm
        self.weight = shard_parameter((vocab_size, hidden), 1, comm, axis="embedding_dim", dtype=dtype, device=device)

    def forward(self, tokens: Tensor) -> Tensor:
        return self._leave(F.embedding(self._enter(tokens, Replicate()), self.weight, self.padding_idx), Shard(-1))


class SharedCopy:
    """One copy of x in front of those `layers` of `parent` that are called on the same x, so that its gradient is
    reduced once for all of them, behind their weights'. It holds x within one forward of `parent`; elsewhere each call
    copies for itself."""

    def __init__(self, parent: nn.Module, name: str, layers: Sequence[StyledColumn], comm: Communicator):
        self.layers, self.comm, self.tag = layers, comm, f"{name}.input"
        self.active, self.last = False, None
        parent.register_forward_pre_hook(self._begin)
        parent.register_forward_hook(self._end, always_call=True)

    def __call__(self, layer: StyledColumn, x: Tensor) -> tuple[Tensor, Tensor]:
        """x as `layer` is to read it, and its tap."""
        now, layers = (x._version, autocast_dtype(x)), self.layers if self.active else [layer]
        if self.last is None or self.last[0] is not x or self.last[1] != now:
            self.last = x, now, copied(x, self.comm, [each.added() for each in layers], tag=self.tag)
        whole, taps = self.last[2]
        if not self.active:
            self.last = None
        return whole, taps[layers.index(layer)]

    def _begin(self, *_) -> None:
        self.active, self.last = True, None

    def _end(self, *_) -> None:
        self.active, self.last = False, None


def copy_in_blocks(parameter: Tensor, comm: Communicator, ranks: int, *, tag: str) -> Tensor:
    """The parameter; in backward its gradient is summed over this rank's block of `ranks` neighbours."""
    return _CopyInBlocks.apply(parameter, comm, ranks, tag)


class _CopyInBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parameter: Tensor, comm: Communicator, ranks: int, tag: str) -> Tensor:
        ctx.comm, ctx.ranks, ctx.tag = comm, ranks, tag
        return parameter.view_as(parameter)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        # Every rank's, of which it adds those of its block: the weights of shared heads are small.
        every = ctx.comm.all_gather(grad.new_empty(ctx.comm.size, *grad.shape), grad, tag=f"{ctx.tag}.grad")
        first = ctx.comm.rank // ctx.ranks * ctx.ranks
        return every[first : first + ctx.ranks].sum(0), None, None, None


@torch.no_grad()
def become(module: nn.Module, layer: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    """Make `module` the `layer`, with `parameters` in place of the layer's; hooks, mode and other attributes stay."""
    for name, parameter in parameters.items():
        module.register_parameter(name, parameter)
    own = vars(nn.Module())
    module.__dict__.update({key: value for key, value in vars(layer).items() if key not in own})
    module.__class__ = type(layer)
