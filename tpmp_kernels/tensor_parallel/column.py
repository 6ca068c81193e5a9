"""Column layers that read the same X: one copy or gather in front of all of them, one reduction of dX behind."""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from tpmp_kernels import ops
from tpmp_kernels.comm import autograd, overlap
from tpmp_kernels.comm.communicator import Communicator
from tpmp_kernels.tensor_parallel.copies import autocast_dtype, through


class ColumnLayer(Protocol):
    """What stands behind the copy: ColumnParallelLinear, VocabParallelHead."""

    comm: Communicator
    weight: Tensor
    bias: Tensor | None
    activation: str | None
    sequence_parallel: bool
    gather_output: bool
    overlap: str


def column_linears(x: Tensor, layers: Sequence[ColumnLayer]) -> tuple[Tensor, ...]:
    """The outputs of several column layers on one x, as each alone would give them: q, k, v.

    x [.., K], or x_shard_m [M/R, K] where the layers are sequence parallel -> [.., N_i/R], or [.., N_i] where a layer
    gathers its output. Errors as ops.linear, and ValueError where the layers differ in communicator, sequence
    parallelism or overlap, or x is no shard of tokens.
    """
    _check_alike("column_linears", x, layers)
    outputs = _overlapped(x, layers)

    def products(x: Tensor, taps: Sequence[Tensor | None]) -> list[Tensor]:
        return [
            ops.linear(x, layer.weight, layer.bias, activation=layer.activation, tap=tap)
            for layer, tap in zip(layers, taps, strict=True)
        ]

    outputs = outputs or _columns(x, layers, products)
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

    _check_alike("gate_and_up", x, [gate, up])
    outputs = _overlapped(x, [gate, up])
    if outputs is not None:
        return ops.glu(*outputs, activation=activation)

    def product(x: Tensor, taps: Sequence[Tensor | None]) -> list[Tensor]:
        return [ops.gated_linear(x, gate.weight, up.weight, activation=activation, taps=None if None in taps else taps)]

    (y,) = _columns(x, [gate, up], product)
    return y


def gathered_output(y: Tensor, layer: ColumnLayer) -> Tensor:
    """y, or the whole of it where the layer is one that gathers."""
    # Whoever takes the whole Y does the same on every rank, so that each has its whole gradient.
    return autograd.all_gather(y, layer.comm, dim=-1, grad="slice", tag="column.output") if layer.gather_output else y


def _check_alike(call: str, x: Tensor, layers: Sequence[ColumnLayer]) -> None:
    first = layers[0]
    if any(layer.comm is not first.comm or layer.sequence_parallel != first.sequence_parallel for layer in layers):
        raise ValueError(
            f"{call}: the layers differ in communicator or sequence_parallel, so that no one copy of x serves them; "
            "make them alike, or call them one by one"
        )
    if any(layer.overlap != first.overlap for layer in layers):
        raise ValueError(f"{call}: the layers differ in overlap; make them alike, or call them one by one")
    if first.sequence_parallel and x.dim() != 2:
        raise ValueError(
            f"{call}: under sequence parallelism x must be a shard of the flattened tokens, [M/R, K], got "
            f"{list(x.shape)}; pass this rank's rows of the flattened x"
        )


def _columns(x: Tensor, layers: Sequence[ColumnLayer], products: Callable) -> Sequence[Tensor]:
    comm, sequence_parallel = layers[0].comm, layers[0].sequence_parallel
    if comm.size == 1:
        return products(x, [None] * len(layers))
    parameters = *(layer.weight for layer in layers), *(layer.bias for layer in layers)
    return through(products, x, comm, parameters, sequence_parallel=sequence_parallel, tag="column")


def _overlapped(x: Tensor, layers: Sequence[ColumnLayer]) -> list[Tensor] | None:
    """The outputs in chunks, where the layers' overlap says so. None where it does not: `through` has bias and
    activation in the GEMM's epilogue, and dX travels under the weight gradients there too."""
    first, weights = layers[0], [layer.weight for layer in layers]
    if first.overlap == "none" or any(layer.activation is not None for layer in layers):
        return None
    name, run = "copy_linear", overlap.copy_linears
    if first.sequence_parallel:
        name, run = "all_gather_linear", overlap.all_gather_linears
    shapes, dtype = [weight.shape for weight in weights], autocast_dtype(x)
    how = {"mode": first.overlap, "rates": first.rates, "device": x.device.type}
    plan = overlap.plan_of(name, x.shape, shapes, dtype, first.comm, **how)
    if plan.chunks == 1:
        return None
    outputs = run(x, weights, first.comm, mode="chunked", chunks=plan.chunks, tag="column")
    return [y if layer.bias is None else y + layer.bias for y, layer in zip(outputs, layers, strict=True)]
