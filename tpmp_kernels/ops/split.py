"""The backward of linears in two parts that may run at different times: B (input gradient) and W (weight gradient).

Of a whole module, whatever lies between its linears, under activation checkpointing and torch.compile too:

    ops.attach_main_grad(module.parameters())
    with ops.split_backward(module.parameters()) as later:
        torch.autograd.backward(module(x), dy)              B: everything but the products dZ^T @ x
    later.run()                                             W: adds those to the weights' main_grads

Here the ops' own backward hands over (dZ, x) where it would multiply. A compiled graph may write its next result over
them, so that from there they are copied. Of one linear, by hand:

    t = ops.tap(x, weight)
    y = ops.linear(x, weight, bias, tap=t)
    dx, dz = torch.autograd.grad(y, [x, t], dy)             B: a GEMM, and the stage below can go on
    ops.wgrad(dz, x, main_grad=weight.main_grad)            W: whenever there is time; dbias is dz.sum over rows

A tap is added to z = x @ weight^T + bias, as zeros without memory that nobody reads, so its gradient is dZ. Nothing
but x and dZ is kept for W, by the caller, and under torch.compile both leave the graph as ordinary outputs.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tpmp_kernels import reference
from tpmp_kernels.ops import backend, checks
from tpmp_kernels.ops._register import below_autograd, lowest, register
from tpmp_kernels.ops.main_grad import add_product, slot
from tpmp_kernels.ops.plain import as_rows, gemm, mm
from tpmp_kernels.ops.sharding import cut


def tap(x: Tensor, weight: Tensor) -> Tensor:
    """Zeros of z's shape, one element in memory, that require grad: ops.linear(..., tap=) makes their gradient dZ.

    x [..., K], weight [N, K] -> [..., N], in the dtype in which the linear will run. ValueError for shapes.
    """
    checks.weight("tap", "weight", weight, x)
    device = x.device.type
    cast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if cast else x.dtype
    return x.new_zeros((), dtype=dtype).expand(*x.shape[:-1], weight.shape[0]).requires_grad_()


def dgrad(dz: Tensor, weight: Tensor) -> Tensor:
    """The input gradient dz @ weight of a linear. dz [..., N], weight [N, K] -> [..., K], in dz's dtype.

    Raises ValueError for shapes and devices, TypeError for dtypes.
    """
    checks.tensors("dgrad", dz=dz, weight=weight)
    if dz.dim() == 0 or weight.dim() != 2 or weight.shape[0] != dz.shape[-1]:
        raise ValueError(
            f"dgrad: weight has shape {list(weight.shape)} but dz has shape {list(dz.shape)}; pass dz [..., N] and a "
            "weight [N, K]"
        )
    checks.together("dgrad", dz, first="dz", weight=weight)
    if backend.choose(dz) == "reference":
        return reference.dgrad(dz, weight)
    return _dgrad(dz, weight)


def wgrad(dz: Tensor, x: Tensor, *, main_grad: Tensor | None = None) -> Tensor | None:
    """The weight gradient dz^T @ x of a linear: returned, or added to main_grad, in place.

    dz [..., N], x [..., K] -> [N, K] in their dtype; or None, where there is a main_grad [N, K], contiguous, fp32 (fp64
    for fp64). Adding to the main_grad of a parameter starts from zero after zero_grad has set `.grad` to None. Adding
    has no gradient. Raises ValueError for shapes and devices, TypeError for dtypes.
    """
    checks.tensors("wgrad", dz=dz, x=x)
    if dz.dim() == 0 or dz.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"wgrad: dz has shape {list(dz.shape)} but x has shape {list(x.shape)}; pass dz [..., N] and x [..., K]"
        )
    checks.together("wgrad", x, dz=dz)
    if main_grad is None:
        return reference.wgrad(dz, x) if backend.choose(dz) == "reference" else _wgrad(dz, x)
    _check_main_grad(dz, x, main_grad)
    _wgrad_into(_as_autocast(dz.detach()), _as_autocast(x.detach()), main_grad, slot(main_grad))
    return None


class Later:
    """The products dZ^T @ x that one backward has left, in its order: what W of a microbatch is."""

    def __init__(self):
        self._products: list[tuple[Tensor, Tensor, Tensor]] = []

    def append(self, parameter: Tensor, dz: Tensor, x: Tensor) -> None:
        """Called in the backward: dz [M, N], x [M, K] of a linear whose weight is `parameter` [N, K]."""
        self._products.append((parameter, dz, x))

    @torch.no_grad()
    def run(self) -> None:
        """Add every product to its parameter's main_grad, the bits that the unsplit backward adds; once."""
        products, self._products = self._products[::-1], []
        while products:  # what a product has read is free again behind it
            parameter, dz, x = products.pop()
            _wgrad_into(dz, x, parameter.main_grad, slot(parameter))

    @property
    def parameters(self) -> set[Tensor]:
        """Whose products are left."""
        return {parameter for parameter, _, _ in self._products}


@contextmanager
def split_backward(parameters: Iterable[Tensor]) -> Iterator[Later]:
    """A backward within leaves the weight gradients of `parameters` to `run()` of what this gives.

    Those are the products of ops.linear, gated_linear, mlp and gated_mlp for weights with a `main_grad`; everything
    else (biases, norms, other modules) is accumulated in the backward as always. Not to be nested for one parameter.
    """
    later, parameters = Later(), [p for p in parameters if slot(p) is not None]
    for parameter in parameters:
        parameter.main_grad_later = later
    try:
        yield later
    finally:
        for parameter in parameters:
            del parameter.main_grad_later


def _check_main_grad(dz: Tensor, x: Tensor, main_grad: Tensor) -> None:
    checks.shape("wgrad", "main_grad", main_grad, (dz.shape[-1], x.shape[-1]))
    wide = torch.promote_types(dz.dtype, torch.float32)
    if main_grad.dtype != wide:
        raise TypeError(
            f"wgrad: main_grad must be {wide} for {dz.dtype}, got {main_grad.dtype}; attach_main_grad makes one"
        )
    if main_grad.device != dz.device or not main_grad.is_contiguous():
        raise ValueError(
            f"wgrad: main_grad must be contiguous and on {dz.device}, got strides {main_grad.stride()} on "
            f"{main_grad.device}; attach_main_grad makes one"
        )


def _as_autocast(t: Tensor) -> Tensor:
    """What autocast makes of the input of a GEMM; as a rule of the op it would cast main_grad too, and write a copy."""
    if torch.is_autocast_enabled(t.device.type) and t.dtype != torch.float64:
        return t.to(torch.get_autocast_dtype(t.device.type))
    return t


def _input_grad(dz: Tensor, weight: Tensor) -> Tensor:
    return mm(as_rows(dz), weight).view(*dz.shape[:-1], weight.shape[1])


def _weight_grad(dz: Tensor, x: Tensor) -> Tensor:
    return mm(as_rows(dz).t(), as_rows(x))


def _add_weight_grad(dz: Tensor, x: Tensor, main_grad: Tensor, slot: Tensor | None) -> None:
    add_product(as_rows(dz), as_rows(x), main_grad, slot=slot)


class _Dgrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dz, weight):
        ctx.save_for_backward(dz, weight)
        with below_autograd():
            return _dgrad(dz, weight)

    @staticmethod
    def backward(ctx, upstream):
        dz, weight = ctx.saved_tensors
        need_dz, need_weight = ctx.needs_input_grad
        rows = as_rows(upstream)
        return (
            gemm(rows, weight).view(dz.shape) if need_dz else None,
            mm(as_rows(dz).t(), rows) if need_weight else None,
        )


class _Wgrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dz, x):
        ctx.save_for_backward(dz, x)
        with below_autograd():
            return _wgrad(dz, x)

    @staticmethod
    def backward(ctx, upstream):
        dz, x = ctx.saved_tensors
        need_dz, need_x = ctx.needs_input_grad
        return (
            gemm(as_rows(x), upstream).view(dz.shape) if need_dz else None,
            mm(as_rows(dz), upstream).view(x.shape) if need_x else None,
        )


def _fake_dgrad(dz, weight):
    return dz.new_empty(*dz.shape[:-1], weight.shape[1])


def _fake_wgrad(dz, x):
    return dz.new_empty(dz.shape[-1], x.shape[-1])


_dgrad = register(
    "dgrad(Tensor dz, Tensor weight) -> Tensor",
    _input_grad,
    _fake_dgrad,
    function=_Dgrad,
    autocast=lowest,
    sharding=cut("*n, nk -> *k", "*nk"),
)
_wgrad = register(
    "wgrad(Tensor dz, Tensor x) -> Tensor",
    _weight_grad,
    _fake_wgrad,
    function=_Wgrad,
    autocast=lowest,
    sharding=cut("*n, *k -> nk", "*nk"),
)
_wgrad_into = register(
    "wgrad_into(Tensor dz, Tensor x, Tensor(a!) main_grad, Tensor? slot) -> ()",
    _add_weight_grad,
    lambda dz, x, main_grad, slot: None,
    sharding="a main_grad belongs to a plain parameter",
)
