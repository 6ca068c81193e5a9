"""The modules of the pipeline stages that this rank holds."""

from collections.abc import Sequence

import torch

from tpmp_kernels.comm import Communicator
from tpmp_kernels.models.decoder import Decoder
from tpmp_kernels.models.weights import initialize
from tpmp_kernels.training.config import Config
from tpmp_kernels.training.plan import partition_of

TIED = "embed_tokens.weight"


def parts_of(
    config: Config, placement: Sequence[int], rank: int, tp: Communicator, *, dtype: torch.dtype, device: str
) -> dict[int, Decoder]:
    """The stages of pipeline rank `rank`, by number, with the values of the config's seed. Where one rank holds the
    first and the last of a tied model, they share the weight."""
    model = config.model
    parts: dict[int, Decoder] = {}
    for part in partition_of(config, placement).parts:
        if part.rank != rank:
            continue
        # Layer 0 of the partition is the embedding, the last one norm and head.
        first, last = part.layers.start == 0, part.layers.stop == model.layers + 2
        parts[part.stage] = Decoder(
            model,
            tp,
            range(max(part.layers.start - 1, 0), min(part.layers.stop - 1, model.layers)),
            first=first,
            last=last,
            sequence_parallel=config.parallel.sequence_parallel,
            sequence=config.data.sequence,
            dropout_seed=config.training.seed,
            dtype=dtype,
            device=device,
        )
        initialize(parts[part.stage], seed=config.training.seed, layers=model.layers, comm=tp)
    ends = 0, len(placement) - 1
    if model.tie_embeddings and ends[0] != ends[1] and all(end in parts for end in ends):
        first, last = (parts[end] for end in ends)
        last.embed_tokens = first.embed_tokens
        last.lm_head.weight = first.embed_tokens.weight
    return parts
