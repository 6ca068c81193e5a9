"""A Llama-style decoder, or any contiguous part of it, assembled from tensor-parallel layers and fused ops.

RMSNorm, rotary positions, grouped-query attention, SwiGLU. `Decoder(..., layers=range(2, 4))` is a pipeline stage: it
holds those layers alone, the embedding where it is the first and the norm and head where it is the last. Parameters
carry the names of Hugging Face's Llama (`layers.3.self_attn.q_proj.weight`), numbered over the whole model, so that
every stage's state_dict is a part of the same whole.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpmp_kernels import ops
from tpmp_kernels.comm import autograd
from tpmp_kernels.comm.communicator import Communicator
from tpmp_kernels.models.config import ModelConfig
from tpmp_kernels.models.rope import rotary, rotary_table
from tpmp_kernels.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    shard_size,
    vocab_parallel_cross_entropy,
)


class RMSNorm(nn.Module):
    def __init__(self, hidden: int, eps: float, *, dtype=None, device=None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, eps=self.eps)


class Attention(nn.Module):
    """Causal grouped-query attention; every rank holds heads/R query heads and kv_heads/R key and value heads."""

    def __init__(self, config: ModelConfig, comm: Communicator, **where):
        super().__init__()
        self.comm, self.theta, self.head_size = comm, config.rope_theta, config.head_size
        self.heads = shard_size(config.heads, comm.size, "heads")
        self.kv_heads = shard_size(config.kv_heads, comm.size, "kv_heads")
        width, kv_width = config.heads * config.head_size, config.kv_heads * config.head_size
        self.q_proj = ColumnParallelLinear(config.hidden, width, comm, input_is_copied=True, **where)
        self.k_proj = ColumnParallelLinear(config.hidden, kv_width, comm, input_is_copied=True, **where)
        self.v_proj = ColumnParallelLinear(config.hidden, kv_width, comm, input_is_copied=True, **where)
        self.o_proj = RowParallelLinear(width, config.hidden, comm, **where)

    def forward(self, x: Tensor) -> Tensor:
        batch, sequence, _ = x.shape
        x = autograd.copy(x, self.comm, tag="attention")
        q = self.q_proj(x).view(batch, sequence, self.heads, self.head_size).transpose(1, 2)
        k = self.k_proj(x).view(batch, sequence, self.kv_heads, self.head_size).transpose(1, 2)
        v = self.v_proj(x).view(batch, sequence, self.kv_heads, self.head_size).transpose(1, 2)
        table = rotary_table(sequence, self.head_size, self.theta, dtype=x.dtype, device=x.device)
        y = F.scaled_dot_product_attention(rotary(q, table), rotary(k, table), v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(batch, sequence, -1))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), the gate and up projections in one op."""

    def __init__(self, config: ModelConfig, comm: Communicator, **where):
        super().__init__()
        self.comm = comm
        self.gate_proj = ColumnParallelLinear(config.hidden, config.ffn, comm, input_is_copied=True, **where)
        self.up_proj = ColumnParallelLinear(config.hidden, config.ffn, comm, input_is_copied=True, **where)
        self.down_proj = RowParallelLinear(config.ffn, config.hidden, comm, **where)

    def forward(self, x: Tensor) -> Tensor:
        x = autograd.copy(x, self.comm, tag="mlp")
        return self.down_proj(ops.gated_linear(x, self.gate_proj.weight, self.up_proj.weight, activation="silu"))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, comm: Communicator, **where):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden, config.norm_eps, **where)
        self.self_attn = Attention(config, comm, **where)
        self.post_attention_layernorm = RMSNorm(config.hidden, config.norm_eps, **where)
        self.mlp = MLP(config, comm, **where)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Layers `layers` of the model; `comm` is the tensor-parallel group.

    forward(x): tokens [B, S] (int64) in the first part, else hidden states [B, S, H]; returns hidden states, or the
    vocabulary shard of the logits [B, S, V/R] in the last part. ValueError where `comm.size` does not divide an axis.
    """

    def __init__(
        self, config: ModelConfig, comm: Communicator, layers: range | None = None, *, dtype=None, device=None
    ):
        super().__init__()
        layers = range(config.layers) if layers is None else layers
        where = {"dtype": dtype, "device": device}
        self.config, self.comm = config, comm
        self.first, self.last = layers.start == 0, layers.stop == config.layers
        if self.first:
            self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden, comm, **where)
        self.layers = nn.ModuleDict({str(i): Layer(config, comm, **where) for i in layers})
        if self.last:
            self.norm = RMSNorm(config.hidden, config.norm_eps, **where)
            self.lm_head = ColumnParallelLinear(config.hidden, config.vocab_size, comm, **where)

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            x = self.embed_tokens(x)
        for layer in self.layers.values():
            x = layer(x)
        return self.lm_head(self.norm(x)) if self.last else x

    def loss(self, logits_shard_n: Tensor, target: Tensor) -> Tensor:
        """Sum over tokens of the cross entropy, in nat; target [B, S] (int64)."""
        return vocab_parallel_cross_entropy(logits_shard_n.flatten(0, 1), target.flatten(), self.comm).sum()
