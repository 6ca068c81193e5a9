"""The output layer with its vocabulary cut over ranks: logits of this rank's tokens, or the loss without any."""

import torch.nn.functional as F
from torch import Tensor, nn

from tpmp_kernels import ops
from tpmp_kernels.comm import autograd
from tpmp_kernels.comm.communicator import Communicator
from tpmp_kernels.tensor_parallel.column import column_linears
from tpmp_kernels.tensor_parallel.shard import ShardedModule
from tpmp_kernels.tensor_parallel.vocabulary import own_ids, vocab_parameter


class VocabParallelHead(ShardedModule):
    """x [.., H] -> logits [.., V/R] of this rank's tokens, V = padded_vocab (see vocabulary.py); padding has -inf.

    weight: the embedding's parameter, to tie the two; both uses add to its gradient. sequence_parallel: x is
    x_shard_m [M/R, H], logits and loss are those of all M tokens. ValueError where R does not divide V, or for a weight
    of another shape.
    """

    bias = activation = None  # a column layer (column.py) without these
    gather_output = False
    overlap = "none"

    def __init__(
        self,
        hidden: int,
        vocab_size: int,
        comm: Communicator,
        *,
        padded_vocab: int | None = None,
        sequence_parallel: bool = False,
        weight: nn.Parameter | None = None,
        dtype=None,
        device=None,
    ):
        super().__init__()
        self.comm, self.vocab_size, self.sequence_parallel = comm, vocab_size, sequence_parallel
        name = type(self).__name__
        own = vocab_parameter(
            name, vocab_size, padded_vocab, hidden, comm, dtype=dtype, device=device if weight is None else "meta"
        )
        if weight is not None and (weight.shape, own_ids(weight, comm)) != (own.shape, own_ids(own, comm)):
            raise ValueError(
                f"{name}: weight is {list(weight.shape)} for ids {own_ids(weight, comm)}, expected {list(own.shape)} "
                f"for {own_ids(own, comm)}; pass that of an embedding of the same hidden, vocab_size and padded_vocab"
            )
        self.weight = own if weight is None else weight

    def forward(self, x: Tensor) -> Tensor:
        (logits,) = column_linears(x, [self])
        real, rows = len(own_ids(self.weight, self.comm)), self.weight.shape[0]
        return logits if real == rows else F.pad(logits[..., :real], (0, rows - real), value=-float("inf"))

    def loss(self, x: Tensor, target: Tensor, **options) -> Tensor:
        """Cross entropy with target (int64, one id for each of all tokens), in nat, the same on every rank; the logits
        are never whole. options: of ops.linear_cross_entropy."""
        if self.sequence_parallel:
            x = autograd.all_gather(x, self.comm, tag="VocabParallelHead")
        return ops.linear_cross_entropy(
            x,
            self.weight,
            target.reshape(x.shape[:-1]),
            group=self.comm,
            vocab_start=own_ids(self.weight, self.comm).start,
            vocab_size=self.vocab_size,
            partial_dx=self.sequence_parallel,  # added by the gather
            **options,
        )
