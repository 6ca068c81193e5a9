"""The token embedding with its vocabulary cut over ranks: each looks up its own tokens, then rows are summed."""

import torch.nn.functional as F
from torch import Tensor, nn

from tpmp_kernels.comm import autograd
from tpmp_kernels.comm.communicator import Communicator
from tpmp_kernels.tensor_parallel.shard import shard_parameter


class VocabParallelEmbedding(nn.Module):
    """tokens [..] (int64) -> [.., H]; weight [V/R, H]: the rows of this rank. ValueError where R does not divide V."""

    def __init__(self, vocab_size: int, hidden: int, comm: Communicator, *, dtype=None, device=None):
        super().__init__()
        self.comm = comm
        self.weight = shard_parameter((vocab_size, hidden), 0, comm, axis="vocab_size", dtype=dtype, device=device)

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.weight.shape[0]
        local = tokens - self.comm.rank * rows
        foreign = (local < 0) | (local >= rows)
        # Row 0 stands in for foreign tokens and is zeroed behind the look-up, so that it gets no gradient from them.
        found = F.embedding(local.masked_fill(foreign, 0), self.weight)
        return autograd.all_reduce(found.masked_fill(foreign.unsqueeze(-1), 0), self.comm, tag="embedding")
