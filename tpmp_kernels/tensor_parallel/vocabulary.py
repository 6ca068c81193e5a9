"""A weight with a row for each token, cut over ranks: the vocabulary is padded so that any usual tp divides it.

The padded length does not depend on tp, so that a checkpoint is of the same shape for every tp. Rows of padding are
zeros, behind the real ones: nobody looks them up, they have no logit and no gradient, and an export leaves them out.
"""

import torch
from torch import nn

from tpmp_kernels.comm.communicator import Communicator
from tpmp_kernels.tensor_parallel.shard import shard_parameter


def padded_vocab_size(vocab_size: int, multiple: int = 128) -> int:
    """`vocab_size` rounded up to a multiple: of 128, every power of two up to 128 ranks divides it."""
    return -(-vocab_size // multiple) * multiple


def vocab_parameter(
    name: str, vocab_size: int, padded_vocab: int | None, hidden: int, comm: Communicator, *, dtype, device
) -> nn.Parameter:
    """An uninitialised parameter [V/R, H], V being padded_vocab: by default a multiple of 128, or for a smaller
    vocabulary of the largest power of two in it. Its rows of padding are zero. ValueError, which begins with `name`,
    where V is too short, and where R does not divide it."""
    multiple = min(128, 2 ** (vocab_size.bit_length() - 1))
    padded = padded_vocab_size(vocab_size, multiple) if padded_vocab is None else padded_vocab
    if padded < vocab_size:
        raise ValueError(
            f"{name}: padded_vocab is {padded}, less than vocab_size, {vocab_size}; pass at least that, or None"
        )
    parameter = shard_parameter((padded, hidden), 0, comm, axis="padded_vocab", dtype=dtype, device=device)
    if padded > vocab_size:
        parameter.tp_unpadded = vocab_size
    with torch.no_grad():
        parameter[len(own_ids(parameter, comm)) :] = 0
    return parameter


def own_ids(parameter: nn.Parameter, comm: Communicator) -> range:
    """The token ids whose rows this rank holds, without padding; empty where it holds nothing else."""
    rows = parameter.shape[0]
    start = comm.rank * rows
    end = min(start + rows, getattr(parameter, "tp_unpadded", start + rows))
    return range(start, max(start, end))
