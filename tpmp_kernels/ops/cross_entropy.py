"""ops.cross_entropy: the loss of given logits, whole or this rank's columns of them, differentiable.

forward   statistics of each row [4, T] in one pass, one exchange over the group, loss
backward  dlogits = d, see ops/vocab.py, from the logits and three numbers a token; no softmax is kept
"""

from typing import Any

import torch
from torch import Tensor

from tpmp_kernels import reference
from tpmp_kernels.ops import backend, checks, vocab
from tpmp_kernels.ops._register import below_autograd, register
from tpmp_kernels.ops.plain import as_rows


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Cross entropy of logits [..., V_r] with the ids target [...] (int64), in fp32 (fp64 for fp64).

    -> [...] for reduction "none", else a scalar; "mean" is over the tokens whose target is not ignore_index. `group`
    cuts the vocabulary over ranks, equally by default; otherwise, `vocab_start` is the id of this rank's first column.
    vocab_size is the number of classes, and must be given on a group; columns beyond it are padding, neither read nor
    given a gradient. The loss is the same bits on all ranks. label_smoothing as in torch; z_loss adds z_loss * lse^2
    (PaLM, 2022); softcap makes the logits cap tanh(z / cap) (Gemma 2, 2024).

    ValueError for shapes, devices, options, shards that do not tile the vocabulary and, on the CPU, a target that is
    no class; TypeError for dtypes.
    """
    checks.tensors("cross_entropy", logits=logits, target=target)
    if logits.dim() == 0:
        raise ValueError("cross_entropy: logits must have at least one dimension, got a scalar; pass [..., V]")
    checks.shape("cross_entropy", "target", target, logits.shape[:-1])
    checks.together("cross_entropy", logits, first="logits")
    loss = vocab.arguments(
        "cross_entropy", logits.shape[-1], target, logits, group, vocab_start, vocab_size,
        label_smoothing, z_loss, softcap, ignore_index, reduction,
    )  # fmt: skip
    if backend.choose(logits) == "reference":
        return reference.cross_entropy(
            logits, target, group=group, vocab_start=vocab_start, vocab_size=vocab_size,
            label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap, ignore_index=ignore_index,
            reduction=reduction,
        )  # fmt: skip
    return _cross_entropy(logits, target, *loss)


def _forward(logits: Tensor, target: Tensor, *options) -> Tensor:
    return _forward_saved(logits, target, *options)[0]


def _forward_saved(logits: Tensor, target: Tensor, *options) -> tuple[Tensor, Tensor]:
    """(loss, what backward needs of each row [3, T])."""
    loss, rows, ids = vocab.Loss(*options), as_rows(logits), target.reshape(-1)
    vocab.check_target("cross_entropy", ids, loss)
    found = vocab.Statistics(ids, torch.promote_types(logits.dtype, torch.float32), loss)
    if classes := loss.classes(rows.shape[1]):
        found.add(rows[:, :classes], loss.start)
    statistics = found.whole("cross_entropy", rows.shape[1])
    each = vocab.losses(statistics, ids, loss)
    return vocab.reduced(each, target, loss), vocab.saved(statistics)


def _backward(dloss: Tensor, logits: Tensor, target: Tensor, statistics: Tensor, *options) -> Tensor:
    loss, rows, ids = vocab.Loss(*options), as_rows(logits), target.reshape(-1)
    gradient = vocab.Gradient(vocab.upstream(dloss, ids, loss), statistics, ids, loss)
    d, classes = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device), loss.classes(rows.shape[1])
    d[:, classes:] = 0
    if classes:
        gradient.put(d[:, :classes], rows[:, :classes], loss.start)
    return d.view(logits.shape)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, *options):
        with below_autograd():
            loss, statistics = _cross_entropy_saved(logits, target, *options)
        ctx.save_for_backward(logits, target, statistics)
        ctx.options = options
        return loss

    @staticmethod
    def backward(ctx, dloss):
        return _cross_entropy_backward(dloss, *ctx.saved_tensors, *ctx.options), None, *(None for _ in ctx.options)


def _fake(logits, target, *options):
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(target.shape if options[-1] == "none" else (), dtype=wide)


def _fake_saved(logits, target, *options):
    loss = _fake(logits, target, *options)
    return loss, loss.new_empty(3, target.numel())


def _fake_backward(dloss, logits, target, statistics, *options):
    return logits.new_empty(logits.shape)


def _single(device_type: str, tensors: list[Tensor]) -> torch.dtype:
    """Autocast's rule for losses."""
    return torch.float32


_SHARDING = "its vocabulary is cut by `group`"
_cross_entropy = register(
    f"cross_entropy(Tensor logits, Tensor target, {vocab.SCHEMA}) -> Tensor",
    _forward,
    _fake,
    function=_CrossEntropy,
    autocast=_single,
    sharding=_SHARDING,
)
_cross_entropy_saved = register(
    f"cross_entropy_saved(Tensor logits, Tensor target, {vocab.SCHEMA}) -> (Tensor, Tensor)",
    _forward_saved,
    _fake_saved,
    sharding=_SHARDING,
)
_cross_entropy_backward = register(
    f"cross_entropy_backward(Tensor dloss, Tensor logits, Tensor target, Tensor statistics, {vocab.SCHEMA}) -> Tensor",
    _backward,
    _fake_backward,
    sharding=_SHARDING,
)
