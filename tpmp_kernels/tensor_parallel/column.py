"""Column layers that read the same X: one copy or gather in front of all of them, one reduction of dX behind.

Backward, with what travels meanwhile where the communicator overlaps (else each call is made where it is needed):

    dZ of every layer, dX = sum over layers of dZ @ W_shard_n       X_shard_m is gathered again
    dW_shard_n = dZ^T @ X, dbias_shard_n = sum(dZ) of every layer   dX is all-reduced, or reduce-scattered along m

Under sequence parallelism X_shard_m alone is kept for backward, for one gather more. The parts of backward come apart
by the taps of ops.linear: dX is the linears' own, dW is made here, behind the start of the reduction.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tpmp_kernels import ops
from tpmp_kernels.comm import autograd
from tpmp_kernels.comm.communicator import Communicator, Work
from tpmp_kernels.ops.main_grad import slot, weight_grad
from tpmp_kernels.ops.plain import as_rows


class ColumnLayer(Protocol):
    """What stands behind the copy: ColumnParallelLinear, VocabParallelHead."""

    comm: Communicator
    weight: Tensor
    bias: Tensor | None
    activation: str | None
    sequence_parallel: bool
    gather_output: bool


def column_linears(x: Tensor, layers: Sequence[ColumnLayer]) -> tuple[Tensor, ...]:
    """The outputs of several column layers on one x, as each alone would give them: q, k, v.

    x [.., K], or x_shard_m [M/R, K] where the layers are sequence parallel -> [.., N_i/R], or [.., N_i] where a layer
    gathers its output. Errors as ops.linear, and ValueError where the layers differ in communicator or sequence
    parallelism, or x is no shard of tokens.
    """

    def products(x: Tensor, taps: Sequence[Tensor | None]) -> list[Tensor]:
        return [
            ops.linear(x, layer.weight, layer.bias, activation=layer.activation, tap=tap)
            for layer, tap in zip(layers, taps, strict=True)
        ]

    outputs = _columns("column_linears", x, layers, products)
    return tuple(gathered_output(y, layer) for y, layer in zip(outputs, layers, strict=True))


def gate_and_up(x: Tensor, gate: ColumnLayer, up: ColumnLayer, *, activation: str = "silu") -> Tensor:
    """act(gate(x)) * up(x) in one op, SwiGLU and GeGLU: x as in column_linears -> [.., N/R]. Raises as there, and
    ValueError where a layer has a bias, an activation of its own or a gathered output."""
    for name, layer in (("gate", gate), ("up", up)):
        if layer.bias is not None or layer.activation is not None or layer.gather_output:
            raise ValueError(
                f"gate_and_up: {name} has a bias, an activation or a gathered output, which the gated op has not; "
                "make it without, or call the layers by column_linears"
            )

    def product(x: Tensor, taps: Sequence[Tensor | None]) -> list[Tensor]:
        return [ops.gated_linear(x, gate.weight, up.weight, activation=activation, taps=None if None in taps else taps)]

    (y,) = _columns("gate_and_up", x, [gate, up], product)
    return y


def gathered_output(y: Tensor, layer: ColumnLayer) -> Tensor:
    """y, or the whole of it where the layer is one that gathers."""
    # Whoever takes the whole Y does the same on every rank, so that each has its whole gradient.
    return autograd.all_gather(y, layer.comm, dim=-1, grad="slice", tag="column.output") if layer.gather_output else y


def _columns(call: str, x: Tensor, layers: Sequence[ColumnLayer], products: Callable) -> Sequence[Tensor]:
    comm, sequence_parallel = layers[0].comm, layers[0].sequence_parallel
    if any(layer.comm is not comm or layer.sequence_parallel != sequence_parallel for layer in layers):
        raise ValueError(
            f"{call}: the layers differ in communicator or sequence_parallel, so that no one copy of x serves them; "
            "make them alike, or call them one by one"
        )
    if sequence_parallel and x.dim() != 2:
        raise ValueError(
            f"{call}: under sequence parallelism x must be a shard of the flattened tokens, [M/R, K], got "
            f"{list(x.shape)}; pass this rank's rows of the flattened x"
        )
    if comm.size == 1:
        return products(x, [None] * len(layers))
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))  # here, so that less is gathered and reduced
    state = _State(comm, sequence_parallel)
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    whole, *taps = _Enter.apply(state, x, *weights, *biases)
    outputs = products(whole, taps)
    return _Leave.apply(state, x, *outputs) if sequence_parallel and comm.overlaps else outputs


@dataclass
class _State:
    """What the two nodes around the layers have in common."""

    comm: Communicator
    sequence_parallel: bool
    whole: "_Pending | None" = None  # X, under way from the backward of _Leave to that of _Enter

    def gather(self, x_shard_m: Tensor) -> "_Pending":
        whole = x_shard_m.new_empty(self.comm.size * len(x_shard_m), x_shard_m.shape[1])
        return _start(self.comm, self.comm.all_gather, whole, x_shard_m, tag="column")

    def reduce(self, dx: Tensor, x: Tensor) -> "_Pending":
        """The sum of dx over the ranks, or this rank's tokens of it."""
        if self.sequence_parallel:
            return _start(self.comm, self.comm.reduce_scatter, torch.empty_like(x), dx, tag="column.grad")
        # In place: X has no other readers than the linears, whose sum this is.
        return _start(self.comm, self.comm.all_reduce, dx.contiguous(), tag="column.grad")


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


class _Enter(torch.autograd.Function):
    """x -> (X as the layers read it, a tap for each); parameters: all weights and then all biases."""

    @staticmethod
    def forward(ctx, state: _State, x: Tensor, *parameters: Tensor | None):
        weights, need = parameters[: len(parameters) // 2], ctx.needs_input_grad[2:]
        whole = state.gather(x).result() if state.sequence_parallel else x.view_as(x)
        taps = [whole.new_zeros(()).expand(*whole.shape[:-1], weight.shape[0]) for weight in weights]
        ctx.need_weight, ctx.need_bias = need[: len(weights)], need[len(weights) :]
        frozen = [tap for tap, *needs in zip(taps, ctx.need_weight, ctx.need_bias, strict=True) if not any(needs)]
        ctx.mark_non_differentiable(*frozen, *([] if ctx.needs_input_grad[1] else [whole]))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        ctx.state, ctx.slots = state, [slot(weight) for weight in weights]
        return whole, *taps

    @staticmethod
    def backward(ctx, dwhole: Tensor | None, *dzs: Tensor | None):
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "column_linears: expected to be differentiated once, since its backward has no gradient; put "
                "comm.autograd.copy in front of layers with input_is_copied=True for second derivatives"
            )
        (x,), state = ctx.saved_tensors, ctx.state
        dx = None if dwhole is None else state.reduce(dwhole, x)
        dzs = [None if dz is None else as_rows(dz) for dz in dzs]
        need_weight = [need and dz is not None for need, dz in zip(ctx.need_weight, dzs, strict=True)]
        rows = None
        if state.sequence_parallel and any(need_weight):
            rows, state.whole = (state.whole or state.gather(x)).result(), None
        elif any(need_weight):
            rows = as_rows(x)
        dweights = [
            weight_grad(dz, rows, slot) if need else None
            for dz, slot, need in zip(dzs, ctx.slots, need_weight, strict=True)
        ]
        dbiases = [dz.sum(0) if need and dz is not None else None for dz, need in zip(dzs, ctx.need_bias, strict=True)]
        return None, None if dx is None else dx.result(), *dweights, *dbiases


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
