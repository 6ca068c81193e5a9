"""A Llama-style decoder, or any contiguous part of it, assembled from tensor-parallel layers and fused ops.

RMSNorm, rotary positions, grouped-query attention, SwiGLU. `Decoder(..., layers=range(2, 4))` is a pipeline stage: it
holds those layers alone, with the embedding where it is the first and the norm and head where it is the last: by
default where its layers are. Parameters
carry the names of Hugging Face's Llama (`layers.3.self_attn.q_proj.weight`), numbered over the whole model, so that
every stage's state_dict is a part of the same whole.

Dropout falls on the embedding and on what each attention and MLP adds to the residual stream. Its places are numbered
over the whole model: 0 behind the embedding, 2 i + 1 and 2 i + 2 behind attention and MLP of layer i.

With tie_embeddings the head's weight is the embedding's. A last part that is not the first holds it too, under the
embedding's name: a copy, whose gradient is that of the head's use alone and is to be added to the first part's.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpmp_kernels import ops
from tpmp_kernels.comm.communicator import Communicator
from tpmp_kernels.models.config import ModelConfig
from tpmp_kernels.tensor_parallel import (
    ColumnParallelLinear,
    Dropout,
    DropoutKey,
    RowParallelLinear,
    ShardedModule,
    VocabParallelEmbedding,
    VocabParallelHead,
    column_linears,
    gate_and_up,
    head_shard,
)


class RMSNorm(ShardedModule):
    def __init__(self, config: ModelConfig, comm: Communicator, *, sequence_parallel: bool, dtype=None, device=None):
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.hidden, dtype=dtype, device=device))
        if sequence_parallel:  # it sees this rank's tokens alone
            self.weight.tp_partial_grad = comm.size

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, eps=self.eps)


class PlacedDropout(Dropout):
    """Dropout at place number `place` of the model; `layer` of the key that it is given stays open."""

    def __init__(self, place: int, config: ModelConfig, comm: Communicator, *, sequence_parallel: bool):
        super().__init__(config.dropout, comm, sequence_parallel=sequence_parallel)
        self.place = place

    def forward(self, x: Tensor, key: DropoutKey | None) -> Tensor:
        """key: None where nothing is dropped."""
        return x if key is None else super().forward(x, replace(key, layer=self.place))


class Attention(nn.Module):
    """Causal grouped-query attention; every rank holds heads/R query heads and kv_heads/R key and value heads, or one
    that it shares with its neighbours."""

    def __init__(self, config: ModelConfig, comm: Communicator, **how):
        super().__init__()
        self.head_size = config.head_size
        replicas = head_shard(config.heads, config.kv_heads, comm).replicas
        width, kv_width = config.heads * config.head_size, config.kv_heads * config.head_size
        self.q_proj = ColumnParallelLinear(config.hidden, width, comm, **how)
        self.k_proj = ColumnParallelLinear(config.hidden, kv_width, comm, replicas=replicas, **how)
        self.v_proj = ColumnParallelLinear(config.hidden, kv_width, comm, replicas=replicas, **how)
        self.o_proj = RowParallelLinear(width, config.hidden, comm, **how)

    def forward(self, x: Tensor, rope_table: Tensor) -> Tensor:
        qkv = column_linears(x, [self.q_proj, self.k_proj, self.v_proj])
        q, k, v = (t.view(-1, len(rope_table), t.shape[-1] // self.head_size, self.head_size) for t in qkv)
        q, k = ops.rope(q, k, rope_table)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(qkv[0].shape))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), the gate and up projections in one op."""

    def __init__(self, config: ModelConfig, comm: Communicator, **how):
        super().__init__()
        self.gate_proj = ColumnParallelLinear(config.hidden, config.ffn, comm, **how)
        self.up_proj = ColumnParallelLinear(config.hidden, config.ffn, comm, **how)
        self.down_proj = RowParallelLinear(config.ffn, config.hidden, comm, **how)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gate_and_up(x, self.gate_proj, self.up_proj, activation="silu"))


class Layer(nn.Module):
    def __init__(self, number: int, config: ModelConfig, comm: Communicator, **how):
        super().__init__()
        self.input_layernorm = RMSNorm(config, comm, **how)
        self.self_attn = Attention(config, comm, **how)
        self.post_attention_layernorm = RMSNorm(config, comm, **how)
        self.mlp = MLP(config, comm, **how)
        cut = {"sequence_parallel": how["sequence_parallel"]}
        self.self_attn_dropout = PlacedDropout(2 * number + 1, config, comm, **cut)
        self.mlp_dropout = PlacedDropout(2 * number + 2, config, comm, **cut)

    def forward(self, x: Tensor, rope_table: Tensor, key: DropoutKey | None) -> Tensor:
        x = x + self.self_attn_dropout(self.self_attn(self.input_layernorm(x), rope_table), key)
        return x + self.mlp_dropout(self.mlp(self.post_attention_layernorm(x)), key)


class Decoder(nn.Module):
    """Layers `layers` of the model; `comm` is the tensor-parallel group. first, last: whether it has the embedding, the
    norm and head; a part may have one of these and no layer.

    forward(x): tokens [B, S] (int64) in the first part, else hidden states [B, S, H]; returns hidden states, in the
    last part those behind the final norm, which `loss` and `logits` take. With sequence_parallel, hidden states are a
    shard of the flattened tokens, [B S/R, H]. After the last backward of a step `reduce_partial_gradients` is due.
    step, microbatch: which one x is, for dropout in training: masks depend on (dropout_seed, step, microbatch, place)
    alone.

    sequence: S, for a part that sees hidden states alone under sequence parallelism. ValueError where `comm.size` does
    not divide an axis or the tokens, where `sequence` is missing or does not divide the tokens, and where dropout in
    training is not told step and microbatch.
    """

    def __init__(
        self,
        config: ModelConfig,
        comm: Communicator,
        layers: range | None = None,
        *,
        first: bool | None = None,
        last: bool | None = None,
        sequence_parallel: bool = False,
        sequence: int | None = None,
        dropout_seed: int = 0,
        dtype=None,
        device=None,
    ):
        super().__init__()
        layers = range(config.layers) if layers is None else layers
        how = {"sequence_parallel": sequence_parallel, "dtype": dtype, "device": device}
        vocab = {"padded_vocab": config.padded_vocab, **how}
        self.config, self.comm, self.sequence_parallel, self.sequence = config, comm, sequence_parallel, sequence
        self.dropout_seed = dropout_seed
        self.first = layers.start == 0 if first is None else first
        self.last = layers.stop == config.layers if last is None else last
        if sequence_parallel and not self.first and sequence is None:
            raise ValueError(
                f"Decoder: layers {layers.start} to {layers.stop - 1} see tokens flattened by sequence parallelism; "
                "pass sequence, the length of one"
            )
        if self.first or (self.last and config.tie_embeddings):
            self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden, comm, **vocab)
        if self.first:
            self.embed_dropout = PlacedDropout(0, config, comm, sequence_parallel=sequence_parallel)
        self.layers = nn.ModuleDict({str(i): Layer(i, config, comm, **how) for i in layers})
        if self.last:
            self.norm = RMSNorm(config, comm, **how)
            weight = self.embed_tokens.weight if config.tie_embeddings else None
            self.lm_head = VocabParallelHead(config.hidden, config.vocab_size, comm, weight=weight, **vocab)

    def forward(self, x: Tensor, *, step: int | None = None, microbatch: int | None = None) -> Tensor:
        sequence, key = self._sequence(x), self._dropout_key(step, microbatch)
        if self.first:
            x = self.embed_dropout(self.embed_tokens(x), key)
        config, wide = self.config, torch.promote_types(x.dtype, torch.float32)
        table = ops.rope_table(sequence, config.head_size, theta=config.rope_theta, dtype=wide, device=x.device)
        for layer in self.layers.values():
            x = layer(x, table, key)
        return self.norm(x) if self.last else x

    def logits(self, hidden: Tensor) -> Tensor:
        """This rank's part of the vocabulary, [.., V/R], of what the last part returned."""
        return self.lm_head(hidden)

    def loss(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Sum over tokens of the cross entropy, in nat, of what the last part returned; target [B, S] (int64)."""
        return self.lm_head.loss(hidden, target, reduction="sum")

    def _dropout_key(self, step: int | None, microbatch: int | None) -> DropoutKey | None:
        """None where nothing is dropped; layer is left to the places."""
        if not self.training or self.config.dropout == 0:
            return None
        if step is None or microbatch is None:
            raise ValueError(
                f"Decoder: dropout of {self.config.dropout} in training needs step and microbatch for its masks, got "
                f"step={step} and microbatch={microbatch}; pass both, or call eval()"
            )
        return DropoutKey(self.dropout_seed, step, 0, microbatch)

    def _sequence(self, x: Tensor) -> int:
        if self.first or not self.sequence_parallel:
            return x.shape[1]
        if len(x) * self.comm.size % self.sequence:
            raise ValueError(
                f"Decoder: {len(x)} tokens on each of {self.comm.size} ranks are not whole sequences of "
                f"{self.sequence}; pass shards of whole sequences, or the Decoder their length"
            )
        return self.sequence
