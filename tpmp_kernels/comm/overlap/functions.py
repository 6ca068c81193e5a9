"""The four linears as autograd functions: forward and backward are passes of chunks.py, with the ops' own dW behind.

Each takes (to, slots, x, *weights): the pass of its forward and the weights' main_grad slots. What backward sends is
named after forward, with ".grad".
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import Function

from tpmp_kernels.comm.overlap.chunks import Pass, Pending, gathered, reduced, scattered, sum_of_products, widened
from tpmp_kernels.ops.main_grad import weight_grad
from tpmp_kernels.ops.plain import as_rows, mm


class AllReduced(Function):
    """Y = sum over ranks of x @ weight^T; backward is the GEMMs alone."""

    @staticmethod
    def forward(ctx, to: Pass, slots: Sequence[Tensor | None], x: Tensor, weight: Tensor) -> Tensor:
        _save(ctx, to, slots, x, weight)
        y = x.new_empty(*x.shape[:-1], weight.shape[0])
        reduced([(as_rows(x), weight.t())], as_rows(y), to).result()
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        _refuse_graph(ctx)
        x, (weight,) = _saved(ctx)
        dz = as_rows(dy).to(ctx.dtype)
        dx = mm(dz, weight).view(ctx.shape) if ctx.need_x else None
        return None, None, dx, *_weight_grads(ctx, [dz], lambda: as_rows(x))


class Copied(Function):
    """Y_i = x @ weight_i^T; dX is summed over weights and ranks, and what of it is late travels under the dW."""

    @staticmethod
    def forward(ctx, to: Pass, slots: Sequence[Tensor | None], x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        _save(ctx, to, slots, x, *weights)
        ctx.set_materialize_grads(False)
        ys = tuple(x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights)
        rows = as_rows(x)
        for y, weight in zip(ys, weights, strict=True):
            sum_of_products([(rows, widened(weight.t(), rows))], as_rows(y))
        return ys

    @staticmethod
    def backward(ctx, *dys: Tensor | None):
        to, (x, weights), dzs = _backward(ctx), _saved(ctx), _rows(ctx, dys)
        if not any(dz is not None for dz in dzs):
            return (None,) * (3 + len(dys))
        dx = _like_x(ctx, dys) if ctx.need_x else None
        pending = reduced(_terms(dzs, weights), as_rows(dx), to) if ctx.need_x else None
        dweights = _weight_grads(ctx, dzs, lambda: as_rows(x))
        if pending is not None:
            pending.result()
        return None, None, dx, *dweights


class Scattered(Function):
    """Y_shard_m = this rank's rows of the sum over ranks of x @ weight^T; dY is gathered in front of dX and dW."""

    @staticmethod
    def forward(ctx, to: Pass, slots: Sequence[Tensor | None], x: Tensor, weight: Tensor) -> Tensor:
        _save(ctx, to, slots, x, weight)
        y = x.new_empty(len(x) // to.comm.size, weight.shape[0])
        return scattered([(x, weight.t())], y, to).result()

    @staticmethod
    def backward(ctx, dy: Tensor):
        to, (x, (weight,)) = _backward(ctx), _saved(ctx)
        dx = _like_x(ctx, [dy]) if ctx.need_x else None
        dy, pieces = dy.to(ctx.dtype), []
        right = widened(weight, dy) if ctx.need_x else None
        for rows, piece in gathered(dy, to):
            pieces.append(piece)
            if ctx.need_x:
                sum_of_products([(piece, right)], dx.unflatten(0, (to.comm.size, len(dy)))[:, rows])
        # Of one chunk this is the piece itself.
        dz = (pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)).flatten(0, 1)
        return None, None, dx, *_weight_grads(ctx, [dz], lambda: x)


class Gathered(Function):
    """Y_i = X @ weight_i^T of the x of all ranks. Only x is kept: backward gathers X again, while it multiplies dX."""

    @staticmethod
    def forward(ctx, to: Pass, slots: Sequence[Tensor | None], x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        _save(ctx, to, slots, x, *weights)
        ctx.set_materialize_grads(False)
        m, ranks = len(x), to.comm.size
        ys = tuple(x.new_empty(ranks * m, weight.shape[0]) for weight in weights)
        rights = [widened(weight.t(), x) for weight in weights]
        for rows, piece in gathered(x, to):
            for y, right in zip(ys, rights, strict=True):
                sum_of_products([(piece, right)], y.unflatten(0, (ranks, m))[:, rows])
        return ys

    @staticmethod
    def backward(ctx, *dys: Tensor | None):
        to, (x, weights), dzs = _backward(ctx), _saved(ctx), _rows(ctx, dys)
        if not any(dz is not None for dz in dzs):
            return (None,) * (3 + len(dys))
        whole = None
        if any(ctx.need_weights):
            # First of all on the link: it is wanted before the last of dX is.
            out = x.new_empty(to.comm.size * len(x), x.shape[1])
            whole = Pending(out, [to.start(to.comm.all_gather, out, x, part=".x")])
        dx = _like_x(ctx, dys) if ctx.need_x else None
        pending = scattered(_terms(dzs, weights), dx, to) if ctx.need_x else None
        dweights = _weight_grads(ctx, dzs, lambda: whole.result())
        if pending is not None:
            pending.result()
        return None, None, dx, *dweights


def _save(ctx, to: Pass, slots: Sequence[Tensor | None], x: Tensor, *weights: Tensor) -> None:
    ctx.to, ctx.slots, ctx.shape, ctx.dtype = to, slots, x.shape, x.dtype
    ctx.need_x, ctx.need_weights = ctx.needs_input_grad[2], ctx.needs_input_grad[3:]
    ctx.save_for_backward(x if any(ctx.need_weights) else None, *(weights if ctx.need_x else [None] * len(weights)))


def _saved(ctx) -> tuple[Tensor | None, Sequence[Tensor | None]]:
    """x and the weights, each None where no gradient needs it."""
    x, *weights = ctx.saved_tensors
    return x, weights


def _backward(ctx) -> Pass:
    _refuse_graph(ctx)
    return Pass(ctx.to.comm, ctx.to.plan, f"{ctx.to.tag}.grad")


def _refuse_graph(ctx) -> None:
    if torch.is_grad_enabled():
        raise NotImplementedError(
            f"{ctx.to.tag}: expected to be differentiated once, since its backward has no gradient; compose "
            "torch.nn.functional.linear and comm.autograd for second derivatives"
        )


def _rows(ctx, dys: Sequence[Tensor | None]) -> list[Tensor | None]:
    """dZ [M, N] of each output that was used."""
    return [None if dy is None else as_rows(dy).to(ctx.dtype) for dy in dys]


def _terms(dzs: Sequence[Tensor | None], weights: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(dz, weight) for dz, weight in zip(dzs, weights, strict=True) if dz is not None]


def _like_x(ctx, dys: Sequence[Tensor | None]) -> Tensor:
    some = next(dy for dy in dys if dy is not None)
    return some.new_empty(ctx.shape, dtype=ctx.dtype)


def _weight_grads(ctx, dzs: Sequence[Tensor | None], x: Callable[[], Tensor]) -> list[Tensor | None]:
    """dW of each weight that needs one, or None where it was added to a main_grad; x() is the whole X [M, K]."""
    return [
        weight_grad(dz, x(), slot) if need and dz is not None else None
        for dz, slot, need in zip(dzs, ctx.slots, ctx.need_weights, strict=True)
    ]
