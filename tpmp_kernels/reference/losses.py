"""Cross entropy by its definition, on whole rows of logits; on a group the shards of all ranks are gathered first."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """(1 - a) (lse - z_target) + a (lse - mean(z)) + c lse^2 of each token, with a label_smoothing and c z_loss.

    logits [..., V_r], target [...] -> [...] or a scalar, in at least fp32; z = cap tanh(logits / cap) with a softcap.
    """
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    if group is not None and group.size > 1:
        start = group.rank * z.shape[-1] if vocab_start is None else vocab_start
        z = _Gathered.apply(z, group, start, vocab_size)
    z = z[..., :vocab_size]
    valid = target != ignore_index
    log_p = F.log_softmax(z, -1)
    truth = log_p.gather(-1, target.where(valid, 0).unsqueeze(-1)).squeeze(-1)
    each = -(1 - label_smoothing) * truth
    if label_smoothing > 0:
        each = each - label_smoothing * log_p.mean(-1)
    if z_loss > 0:
        each = each + z_loss * z.logsumexp(-1).square()
    each = each.masked_fill(~valid, 0)
    if reduction == "none":
        return each
    return each.sum() / (valid.sum() if reduction == "mean" else 1)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
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
    grad_scale: float | None = None,
    partial_dx: bool = False,
) -> Tensor:
    """cross_entropy(x @ weight^T, target), logits in at least fp32. x [..., D], weight [V_r, D], target [...].

    On a group x is the same on all ranks, and its gradient complete, or with partial_dx this rank's part of the sum.
    grad_scale is what the caller will pass to backward; nothing here depends on it.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    x = x if partial_dx or group is None or group.size == 1 else _Shared.apply(x, group)
    return cross_entropy(
        F.linear(x.to(wide), weight.to(wide)),
        target,
        group=group,
        vocab_start=vocab_start,
        vocab_size=vocab_size,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        ignore_index=ignore_index,
        reduction=reduction,
    )


class _Gathered(torch.autograd.Function):
    """The columns of all ranks in the order of their ids; the gradient of a rank's own columns is its slice."""

    @staticmethod
    def forward(ctx, z, group, start, vocab_size):
        shard = torch.tensor([start, z.shape[-1]], device=z.device)
        shards = group.all_gather(shard.new_empty(group.size, 2), shard, tag="reference.shards").tolist()
        padded = F.pad(z, (0, max(rows for _, rows in shards) - z.shape[-1])).contiguous()
        gathered = group.all_gather(padded.new_empty(group.size, *padded.shape), padded, tag="reference.logits")
        ctx.start, ctx.rows = start, z.shape[-1]
        columns = [each[..., :rows] for each, (_, rows) in sorted(zip(gathered, shards, strict=True), key=_start)]
        return torch.cat(columns, -1)[..., :vocab_size]

    @staticmethod
    def backward(ctx, grad):
        own = grad[..., ctx.start : ctx.start + ctx.rows]
        return F.pad(own, (0, ctx.rows - own.shape[-1])), None, None, None


def _start(part: tuple[Tensor, list[int]]) -> int:
    return part[1][0]


class _Shared(torch.autograd.Function):
    """x, the same on every rank; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.group.all_reduce(grad.contiguous().clone(), tag="reference.dx"), None
