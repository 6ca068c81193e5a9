"""Layers that hold one rank's shard of a weight."""

from tpmp_kernels.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from tpmp_kernels.tensor_parallel.embedding import VocabParallelEmbedding
from tpmp_kernels.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from tpmp_kernels.tensor_parallel.shard import placement_of, shard_parameter, shard_size, take_shard

__all__ = [
    "ColumnParallelLinear",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "placement_of",
    "shard_parameter",
    "shard_size",
    "take_shard",
    "vocab_parallel_cross_entropy",
]
