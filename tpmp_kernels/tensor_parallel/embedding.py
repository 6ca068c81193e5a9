"""The token embedding with its vocabulary cut over ranks: each looks up its own tokens, then rows are summed."""

import torch.nn.functional as F
from torch import Tensor

from tpmp_kernels.comm.communicator import Communicator
from tpmp_kernels.tensor_parallel.linear import reduce_output
from tpmp_kernels.tensor_parallel.shard import ShardedModule
from tpmp_kernels.tensor_parallel.vocabulary import own_ids, vocab_parameter


class VocabParallelEmbedding(ShardedModule):
    """tokens [..] (int64) -> [.., H]; weight [V/R, H]: the rows of this rank, V = padded_vocab (see vocabulary.py).

    sequence_parallel: return this rank's tokens alone, [M/R, H]. ValueError where R does not divide V or M.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden: int,
        comm: Communicator,
        *,
        padded_vocab: int | None = None,
        sequence_parallel: bool = False,
        dtype=None,
        device=None,
    ):
        super().__init__()
        self.comm, self.sequence_parallel = comm, sequence_parallel
        self.weight = vocab_parameter(
            "VocabParallelEmbedding", vocab_size, padded_vocab, hidden, comm, dtype=dtype, device=device
        )

    def forward(self, tokens: Tensor) -> Tensor:
        ids = own_ids(self.weight, self.comm)
        foreign = (tokens < ids.start) | (tokens >= ids.stop)
        # Row 0 stands in for foreign tokens and is zeroed behind the look-up, so that it gets no gradient from them.
        found = F.embedding((tokens - ids.start).masked_fill(foreign, 0), self.weight)
        found = found.masked_fill(foreign.unsqueeze(-1), 0)
        return reduce_output(found, self.comm, self.sequence_parallel, tag="VocabParallelEmbedding")
