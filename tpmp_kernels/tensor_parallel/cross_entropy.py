"""Cross entropy on logits whose vocabulary is cut over ranks: no rank ever holds a whole row."""

from torch import Tensor

from tpmp_kernels import ops
from tpmp_kernels.comm.communicator import Communicator


def vocab_parallel_cross_entropy(logits_shard_n: Tensor, target: Tensor, comm: Communicator) -> Tensor:
    """Loss of each token, [T], in nat, the same bits on every rank: ops.cross_entropy over equal shards.

    logits_shard_n [T, V/R]: this rank's part of the vocabulary, rank r owning ids r V/R .. (r+1) V/R.
    target [T]: whole ids (int64) in 0 .. V-1.
    """
    if logits_shard_n.dim() != 2 or target.shape != logits_shard_n.shape[:1]:
        raise ValueError(
            f"vocab_parallel_cross_entropy: expected logits [T, V/R] and target [T], got {list(logits_shard_n.shape)} "
            f"and {list(target.shape)}; flatten batch and sequence into T"
        )
    vocab_size = comm.size * logits_shard_n.shape[1]
    return ops.cross_entropy(logits_shard_n, target, group=comm, vocab_size=vocab_size, reduction="none")
