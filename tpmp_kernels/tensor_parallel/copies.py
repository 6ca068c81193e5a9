"""One copy or gather of x in front of several column linears, one reduction of dX behind, and their dW meanwhile.

Backward, with what travels meanwhile where the communicator overlaps (else each call is made where it is needed):

    dZ of every layer, dX = sum over layers of dZ @ W_shard_n       X_shard_m is gathered again
    dW_shard_n = dZ^T @ X, dbias_shard_n = sum(dZ) of every layer   dX is all-reduced, or reduce-scattered along m

Under sequence parallelism X_shard_m alone is kept for backward, for one gather more. The parts of backward come apart
by the taps of ops.linear: dX is the linears' own, dW is made here. Their order is autograd's own, which of the nodes
that are ready takes the one made last: whatever stands behind _Whole, which begins to reduce dX; then _Weights; then
_Reduced, which waits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tpmp_kernels.comm.communicator import Communicator, Work
from tpmp_kernels.ops.main_grad import slot, weight_grad
from tpmp_kernels.ops.plain import as_rows


def through(
    products: Callable[[Tensor, Sequence[Tensor]], Sequence[Tensor]],
    x: Tensor,
    comm: Communicator,
    parameters: Sequence[Tensor | None],
    *,
    sequence_parallel: bool,
    tag: str,
) -> Sequence[Tensor]:
    """products(X, taps), linears of the parameters: all weights and then all biases. x is X, or x_shard_m [M/R, K]."""
    state = _State(comm, tag, sequence_parallel)
    x = _Reduced.apply(x.to(autocast_dtype(x)), state)  # cast here, so that less is gathered and reduced
    taps = _Weights.apply(state, x.detach(), *parameters)
    outputs = products(_Whole.apply(x, state), taps)
    gathers_again = sequence_parallel and any(weight.requires_grad for weight in parameters[: len(taps)])
    return _Leave.apply(state, x, *outputs) if gathers_again and comm.overlaps else outputs


def copied(
    x: Tensor, comm: Communicator, parameters: Sequence[tuple[Tensor, Tensor | None]], *, tag: str
) -> tuple[Tensor, list[Tensor]]:
    """For linears that are called one by one on an x that all ranks hold: x as they are to read it, and a tap for each
    of their (weight, bias), to be used any number of times."""
    state = _State(comm, tag)
    x = _Reduced.apply(x.to(autocast_dtype(x)), state)
    # Of each a node of its own: one that is not called must not see a gradient, be it None.
    taps = [_Weights.apply(state, x.detach(), *each)[0] for each in parameters]
    return _Whole.apply(x, state), taps


def autocast_dtype(x: Tensor) -> torch.dtype:
    """In which a linear takes x."""
    casts = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if casts else x.dtype


@dataclass
class _State:
    """What the nodes have in common."""

    comm: Communicator
    tag: str
    sequence_parallel: bool = False
    whole: "_Pending | None" = None  # X, under way from the backward of _Leave to that of _Weights
    dx: "_Pending | None" = None  # under way from the backward of _Whole to that of _Reduced

    def gather(self, x_shard_m: Tensor) -> "_Pending":
        whole = x_shard_m.new_empty(self.comm.size * len(x_shard_m), x_shard_m.shape[1])
        return _start(self.comm, self.comm.all_gather, whole, x_shard_m, tag=self.tag)

    def reduce(self, dx: Tensor) -> "_Pending":
        """The sum of dx over the ranks, or this rank's tokens of it."""
        tag = f"{self.tag}.grad"
        if self.sequence_parallel:
            own = dx.new_empty(len(dx) // self.comm.size, dx.shape[1])
            return _start(self.comm, self.comm.reduce_scatter, own, dx, tag=tag)
        # In place: X has no other readers than the linears, whose sum this is.
        return _start(self.comm, self.comm.all_reduce, dx.contiguous(), tag=tag)


@dataclass(frozen=True)
class _Pending:
    """A tensor that is on its way, or there."""

    tensor: Tensor
    work: Work | None

    def result(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        return self.tensor


def _start(comm: Communicator, call: Callable, output: Tensor, *inputs: Tensor, tag: str) -> _Pending:
    """Begin a collective that fills `output`; where nothing would overlap, it is carried out at once."""
    work = call(output, *inputs, tag=tag, async_op=comm.overlaps)
    return _Pending(output, work if comm.overlaps else None)


class _Reduced(torch.autograd.Function):
    """x; its gradient is there behind the backward of this."""

    @staticmethod
    def forward(ctx, x: Tensor, state: _State) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.state = state
        return x.view_as(x)

    @staticmethod
    def backward(ctx, placeholder: Tensor | None):
        dx, ctx.state.dx = ctx.state.dx, None
        return None if dx is None else dx.result(), None


class _Weights(torch.autograd.Function):
    """x -> a tap for each of some layers; parameters: all weights and then all biases."""

    @staticmethod
    def forward(ctx, state: _State, x: Tensor, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        weights, need = parameters[: len(parameters) // 2], ctx.needs_input_grad[2:]
        lead = (state.comm.size * len(x),) if state.sequence_parallel else x.shape[:-1]
        taps = tuple(x.new_zeros(()).expand(*lead, weight.shape[0]) for weight in weights)
        ctx.need_weight, ctx.need_bias = need[: len(weights)], need[len(weights) :]
        needed = [any(each) for each in zip(ctx.need_weight, ctx.need_bias, strict=True)]
        ctx.mark_non_differentiable(*(tap for tap, need in zip(taps, needed, strict=True) if not need))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*[x] * any(ctx.need_weight))
        ctx.state, ctx.slots = state, [slot(weight) for weight in weights]
        return taps

    @staticmethod
    def backward(ctx, *dzs: Tensor | None):
        _refuse_graph()
        state = ctx.state
        dzs = [None if dz is None else as_rows(dz) for dz in dzs]
        need_weight = [need and dz is not None for need, dz in zip(ctx.need_weight, dzs, strict=True)]
        if any(need_weight):
            (x,) = ctx.saved_tensors
            rows = (state.whole or state.gather(x)).result() if state.sequence_parallel else as_rows(x)
            state.whole = None
        dweights = [
            weight_grad(dz, rows, slot) if need else None
            for dz, slot, need in zip(dzs, ctx.slots, need_weight, strict=True)
        ]
        dbiases = [dz.sum(0) if need and dz is not None else None for dz, need in zip(dzs, ctx.need_bias, strict=True)]
        return None, None, *dweights, *dbiases


class _Whole(torch.autograd.Function):
    """x -> X, as the layers read it; its backward begins to reduce dX, and passes on what only has its shape."""

    @staticmethod
    def forward(ctx, x: Tensor, state: _State) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.state, ctx.shape = state, x.shape
        return state.gather(x).result() if state.sequence_parallel else x.view_as(x)

    @staticmethod
    def backward(ctx, dwhole: Tensor | None):
        _refuse_graph()
        if dwhole is None:
            return None, None
        ctx.state.dx = ctx.state.reduce(dwhole)
        return dwhole.new_zeros(()).expand(ctx.shape), None


class _Leave(torch.autograd.Function):
    """The layers' outputs as they are; in backward the first of all, it begins to gather X for their weights."""

    @staticmethod
    def forward(ctx, state: _State, x: Tensor, *outputs: Tensor):
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        ctx.state = state
        return tuple(y.data for y in outputs)  # not views: those of a Function could not be written in place

    @staticmethod
    def backward(ctx, *upstream: Tensor | None):
        ctx.state.whole = ctx.state.gather(*ctx.saved_tensors)
        return None, None, *upstream


def _refuse_graph() -> None:
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "column_linears: expected to be differentiated once, since its backward has no gradient; put "
            "comm.autograd.copy in front of layers with input_is_copied=True for second derivatives"
        )
