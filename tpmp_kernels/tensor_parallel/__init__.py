"""Layers that hold one rank's shard of a weight."""

from tpmp_kernels.tensor_parallel.attention import HeadShard, head_shard
from tpmp_kernels.tensor_parallel.column import column_linears, gate_and_up
from tpmp_kernels.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from tpmp_kernels.tensor_parallel.dropout import Dropout, DropoutKey, dropout
from tpmp_kernels.tensor_parallel.embedding import VocabParallelEmbedding
from tpmp_kernels.tensor_parallel.gradients import reduce_partial_gradients
from tpmp_kernels.tensor_parallel.head import VocabParallelHead
from tpmp_kernels.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from tpmp_kernels.tensor_parallel.meshes import close_communicators, communicator_of
from tpmp_kernels.tensor_parallel.parallelize import parallelize
from tpmp_kernels.tensor_parallel.prepare import PrepareModuleInput, PrepareModuleInputOutput, PrepareModuleOutput
from tpmp_kernels.tensor_parallel.shard import (
    ShardedModule,
    placement_of,
    replicas_of,
    shard_of,
    shard_parameter,
    shard_size,
    take_shard,
)
from tpmp_kernels.tensor_parallel.state_dict import full_tensors, load_state_dict, state_dict
from tpmp_kernels.tensor_parallel.styles import ColwiseParallel, ReplicateParallel, RowwiseParallel, SequenceParallel
from tpmp_kernels.tensor_parallel.vocabulary import padded_vocab_size

__all__ = [
    "ColumnParallelLinear",
    "ColwiseParallel",
    "Dropout",
    "DropoutKey",
    "HeadShard",
    "PrepareModuleInput",
    "PrepareModuleInputOutput",
    "PrepareModuleOutput",
    "ReplicateParallel",
    "RowParallelLinear",
    "RowwiseParallel",
    "SequenceParallel",
    "ShardedModule",
    "VocabParallelEmbedding",
    "VocabParallelHead",
    "close_communicators",
    "column_linears",
    "communicator_of",
    "dropout",
    "full_tensors",
    "gate_and_up",
    "head_shard",
    "load_state_dict",
    "padded_vocab_size",
    "parallelize",
    "placement_of",
    "reduce_partial_gradients",
    "replicas_of",
    "shard_of",
    "shard_parameter",
    "shard_size",
    "state_dict",
    "take_shard",
    "vocab_parallel_cross_entropy",
]
