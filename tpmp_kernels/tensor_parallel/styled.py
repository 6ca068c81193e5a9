"""What a style makes of a stock nn.Linear or nn.Embedding: our layers, between the layouts that the style declares.

A stock module becomes one of them in place, by a change of its class: whoever holds the module goes on holding it, and
its name, its hooks and the keys of its state_dict stay.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Partial, Placement, Replicate, Shard

from tpmp_kernels import ops
from tpmp_kernels.comm import Communicator, autograd
from tpmp_kernels.tensor_parallel.embedding import VocabParallelEmbedding
from tpmp_kernels.tensor_parallel.layouts import Group, enter, enter_whole, leave, redistribute
from tpmp_kernels.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from tpmp_kernels.tensor_parallel.shard import replicas_of, shard_parameter
from tpmp_kernels.tensor_parallel.vocabulary import own_ids


class _Laid:
    """Where the tensors of a layer lie: as it gets them, as it gives them, and whether it gives plain ones."""

    def lay(self, name: str, group: Group, source: Placement, target: Placement, local: bool, defers: bool):
        self.name, self.group, self.source, self.target = name, group, source, target
        self.local, self.defers = local, defers
        return self

    def _apply(self, fn, recurse: bool = True):
        """nn.Module's, behind to_empty and the like, which may make new parameters: they get the marks of shard.py."""
        marks = {name: _marks(parameter) for name, parameter in self.named_parameters(recurse=False)}
        super()._apply(fn, recurse)
        for name, parameter in self.named_parameters(recurse=False):
            vars(parameter).update(marks[name])
        return self

    def _enter(self, x: Tensor, wanted: Placement) -> Tensor:
        return enter(x, self.source, wanted, self.group, tag=f"{self.name}.input")

    def _leave(self, y: Tensor, source: Placement) -> Tensor:
        return leave(y, source, self.target, self.group, local=self.local, tag=f"{self.name}.output")


def _marks(parameter: nn.Parameter) -> dict[str, Any]:
    return {name: value for name, value in vars(parameter).items() if name.startswith("tp_")}


class StyledColumn(_Laid, ColumnParallelLinear):
    """ColumnParallelLinear with any layout in front and behind; `shares` is the copy that it has in common with other
    column layers of its parent."""

    shares: "SharedCopy | None" = None

    def forward(self, x: Tensor) -> Tensor:
        x, summed = enter_whole(x, self.source, self.group, tag=f"{self.name}.input")
        if not summed and self.shares is not None:
            x, summed = self.shares(x), True
        replicas = 1 if self.defers else replicas_of(self.weight)
        if not summed and replicas == 1:
            return self._leave(super().forward(x), Shard(-1))
        if not summed:
            x = autograd.copy(x, self.comm, tag=f"{self.name}.input")
        weight, bias = self.weight, self.bias
        if replicas > 1:
            weight = copy_in_blocks(weight, self.comm, replicas, tag=f"{self.name}.weight")
            bias = bias if bias is None else copy_in_blocks(bias, self.comm, replicas, tag=f"{self.name}.bias")
        return self._leave(ops.linear(x, weight, bias, activation=self.activation), Shard(-1))


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


class StyledColumnEmbedding(_Laid, nn.Module):
    """tokens [..] (int64) -> [.., H/R]; weight [V, H/R]: this rank's columns of every row."""

    padding_idx: int | None = None

    def __init__(self, vocab_size: int, hidden: int, comm: Communicator, *, dtype=None, device=None):
        super().__init__()
        self.comm = comm
        self.weight = shard_parameter((vocab_size, hidden), 1, comm, axis="embedding_dim", dtype=dtype, device=device)

    def forward(self, tokens: Tensor) -> Tensor:
        return self._leave(F.embedding(self._enter(tokens, Replicate()), self.weight, self.padding_idx), Shard(-1))


class SharedCopy:
    """One copy of x in front of those column layers of `parent` that are called on the same x, so that its gradient is
    reduced once for all of them. It holds x within one forward of `parent`; elsewhere each call copies for itself."""

    def __init__(self, parent: nn.Module, name: str, comm: Communicator):
        self.comm, self.tag = comm, f"{name}.input"
        self.active, self.last = False, None
        parent.register_forward_pre_hook(self._begin)
        parent.register_forward_hook(self._end, always_call=True)

    def __call__(self, x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return x
        if self.last is None or self.last[0] is not x or self.last[1] != x._version:
            copied = autograd.copy(x, self.comm, tag=self.tag)
            if not self.active:
                return copied
            self.last = (x, x._version, copied)
        return self.last[2]

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
