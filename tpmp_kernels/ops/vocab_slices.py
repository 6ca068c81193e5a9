"""The loss of x @ weight^T on slices of the vocabulary, and its gradients: made again in backward, or in forward."""

from collections.abc import Callable

import torch
from torch import Tensor

from tpmp_kernels.ops import groups, vocab
from tpmp_kernels.ops.plain import as_rows
from tpmp_kernels.ops.vocab_products import Products

_OP = "linear_cross_entropy"
# Tokens whose logits exist at one time in the form in forward: a part of all, so that memory is too, within limits that
# keep the GEMMs large. The same on all ranks, since each chunk has an exchange.
_PART, _LIMITS = 6, {"cpu": (256, 1024), "cuda": (2048, 8192)}
# A half-precision dW takes up to as many chunks as it is, each rounded: at 8, twice the error of one rounding. For more
# it is summed in fp32.
_ROUNDINGS = 8


def losses(x: Tensor, weight: Tensor, target: Tensor, loss: vocab.Loss) -> tuple[Tensor, Tensor]:
    """(loss of each token [T], what `gradients` needs of its row [3, T]). x [..., D], weight [V_r, D], target [T]."""
    vocab.check_target(_OP, target, loss)
    products = Products(x, weight[: loss.classes(weight.shape[0])], target.numel())
    rows = products.operand(as_rows(x))
    found = vocab.Statistics(target, products.wide, loss)
    products.add_statistics(found, rows, loss.start)
    statistics = found.whole(_OP, weight.shape[0])
    return vocab.losses(statistics, target, loss), vocab.saved(statistics)


def gradients(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    statistics: Tensor,
    need_x: bool,
    dweight: Tensor | None,
    *,
    add: bool,
    partial_dx: bool,
    loss: vocab.Loss,
) -> Tensor | None:
    """dx [..., D] if `need_x`, and the gradient of the weight written or, with `add`, added to `dweight` [V_r, D]."""
    classes = loss.classes(weight.shape[0])
    products = Products(x, weight[:classes], target.numel())
    rows = products.operand(as_rows(x))
    dx = rows.new_zeros(rows.shape, dtype=products.wide) if need_x else None
    gradient = vocab.Gradient(vocab.upstream(dloss, target, loss), statistics, target, loss)
    finish, slices = _nothing, list(products.slices())
    for ids in slices:
        d = products.gradient(gradient, rows, ids, loss.start)
        if dx is not None:
            products.add_dx(dx, d, ids)
        if ids is slices[-1]:
            finish = _reduce(dx, partial_dx, loss)  # under the last of dW
        if dweight is not None:
            products.put_dweight(dweight, d, rows, ids, add=add)
    if not slices:
        finish = _reduce(dx, partial_dx, loss)
    if dweight is not None and not add:
        dweight[classes:] = 0
    finish()
    return _given(dx, x)


def losses_and_gradients(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    grad_scale: float,
    need_x: bool,
    need_weight: bool,
    wide: bool,
    partial_dx: bool,
    loss: vocab.Loss,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(loss of each token [T], dx, dweight) for the upstream gradient grad_scale; `wide`: dweight in at least fp32."""
    vocab.check_target(_OP, target, loss)
    tokens, classes, features = target.numel(), loss.classes(weight.shape[0]), as_rows(x)
    least, most = _LIMITS["cuda" if x.is_cuda else "cpu"]
    chunk = max(least, min(most, -(-tokens // _PART)))
    chunks = [slice(top, min(top + chunk, tokens)) for top in range(0, max(tokens, 1), chunk)]
    products = Products(x, weight[:classes], min(chunk, tokens))
    each = torch.empty(tokens, dtype=products.wide, device=x.device)
    g = vocab.upstream(each.new_tensor(grad_scale), target, loss)
    dx = torch.zeros(features.shape, dtype=products.wide, device=x.device) if need_x else None
    dtype = products.wide if wide or len(chunks) > _ROUNDINGS else weight.dtype
    dweight = torch.empty(weight.shape, dtype=dtype, device=weight.device) if need_weight else None
    finishes, by_chunks = [], groups.overlaps(loss.group)
    for tokens in chunks:
        rows, own = products.operand(features[tokens]), target[tokens]
        found = vocab.Statistics(own, products.wide, loss)
        logits = []
        for ids in products.slices():
            logits.append(products.logits(rows, ids, keep=True))
            found.add(logits[-1], loss.start + ids.start)
        statistics = found.whole(_OP, weight.shape[0], grad_scale)
        each[tokens] = vocab.losses(statistics, own, loss)
        gradient = vocab.Gradient(g[tokens], vocab.saved(statistics), own, loss)
        own_dx = None if dx is None else dx[tokens]
        for ids, z in zip(products.slices(), logits, strict=True):
            d = products.gradient_of(gradient, z, loss.start + ids.start)
            if own_dx is not None:
                products.add_dx(own_dx, d, ids)
            if dweight is not None:
                products.put_dweight(dweight, d, rows, ids, add=tokens.start > 0)
        if by_chunks:
            finishes.append(_reduce(own_dx, partial_dx, loss))  # under the next chunk
    if not by_chunks:
        finishes.append(_reduce(dx, partial_dx, loss))
    if dweight is not None:
        dweight[classes:] = 0
        dweight = dweight if wide else dweight.to(weight.dtype)
    for finish in finishes:
        finish()
    return each, _given(dx, x), dweight


def _nothing() -> None:
    """Of a dx that needs no reduction."""


def _reduce(dx: Tensor | None, partial_dx: bool, loss: vocab.Loss) -> Callable[[], object]:
    """Begin to sum dx, of which each rank has the part of its columns, over the ranks, unless it is to stay partial."""
    if dx is None or partial_dx:
        return _nothing
    return groups.post_all_reduce(dx, loss.group, f"{_OP}.dx")


def _given(dx: Tensor | None, x: Tensor) -> Tensor | None:
    """dx, rounded once."""
    return None if dx is None else dx.to(x.dtype).view(x.shape)
