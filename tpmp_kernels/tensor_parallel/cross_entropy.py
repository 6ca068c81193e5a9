"""Cross entropy on logits whose vocabulary is cut over ranks: no rank ever holds a whole row.

loss_t = log(sum_v exp(z_tv)) - z_t,target. Each rank contributes its maximum, then its sum of exponentials and the
target's logit where it owns it; two small all-reduces of one and two numbers a token. Computed in fp32 (fp64 for fp64
logits) whatever the dtype of the logits.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tpmp_kernels.comm.communicator import Communicator


def vocab_parallel_cross_entropy(logits_shard_n: Tensor, target: Tensor, comm: Communicator) -> Tensor:
    """Loss of each token, [T], in nat, the same on every rank.

    logits_shard_n [T, V/R]: this rank's part of the vocabulary, rank r owning ids r V/R .. (r+1) V/R.
    target [T]: whole ids (int64) in 0 .. V-1.
    """
    if logits_shard_n.dim() != 2 or target.shape != logits_shard_n.shape[:1]:
        raise ValueError(
            f"vocab_parallel_cross_entropy: expected logits [T, V/R] and target [T], got {list(logits_shard_n.shape)} "
            f"and {list(target.shape)}; flatten batch and sequence into T"
        )
    return _VocabParallelCrossEntropy.apply(logits_shard_n, target, comm)


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_shard_n: Tensor, target: Tensor, comm: Communicator) -> Tensor:
        z = logits_shard_n.to(torch.promote_types(logits_shard_n.dtype, torch.float32))
        columns = z.shape[1]
        local = target - comm.rank * columns
        owned = (local >= 0) & (local < columns)
        local = local.masked_fill(~owned, 0)

        peak = comm.all_reduce(z.amax(dim=1), "max", tag="loss.max")
        p = (z - peak.unsqueeze(1)).exp_()
        target_logit = z.gather(1, local.unsqueeze(1)).squeeze(1).masked_fill(~owned, 0)
        total, target_logit = comm.all_reduce(torch.stack([p.sum(dim=1), target_logit]), tag="loss.sum")

        p.div_(total.unsqueeze(1))
        ctx.save_for_backward(p, local, owned)
        ctx.dtype = logits_shard_n.dtype
        return total.log() + peak - target_logit

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        p, local, owned = ctx.saved_tensors
        # p - 1 of the true class in the wide dtype: formed after rounding to bf16 it would cancel.
        d = p.scatter_add(1, local.unsqueeze(1), -owned.to(p.dtype).unsqueeze(1))
        return (d * grad.unsqueeze(1)).to(ctx.dtype), None, None
