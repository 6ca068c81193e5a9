"""The same decoder in stock torch modules, unsharded and unfused: the oracle of tests and of the proof.

It shares nothing with decoder.py but the config, the parameter names and the rotary table, so that a mistake in a
sharded layer, a fused op or a collective cannot be in both.
"""

import torch
from torch import Tensor, nn

from tpmp_kernels.models.config import ModelConfig
from tpmp_kernels.models.rope import rotary, rotary_table


class ReferenceLayer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        width, kv_width = config.heads * config.head_size, config.kv_heads * config.head_size
        self.input_layernorm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(config.hidden, width, bias=False),
                "k_proj": nn.Linear(config.hidden, kv_width, bias=False),
                "v_proj": nn.Linear(config.hidden, kv_width, bias=False),
                "o_proj": nn.Linear(width, config.hidden, bias=False),
            }
        )
        self.post_attention_layernorm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(config.hidden, config.ffn, bias=False),
                "up_proj": nn.Linear(config.hidden, config.ffn, bias=False),
                "down_proj": nn.Linear(config.ffn, config.hidden, bias=False),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.input_layernorm(x))
        h, mlp = self.post_attention_layernorm(x), self.mlp
        return x + mlp["down_proj"](nn.functional.silu(mlp["gate_proj"](h)) * mlp["up_proj"](h))

    def attention(self, x: Tensor) -> Tensor:
        config, proj = self.config, self.self_attn
        q, k, v = (proj[name](x).unflatten(-1, (-1, config.head_size)).transpose(1, 2) for name in _QKV)
        table = rotary_table(x.shape[1], config.head_size, config.rope_theta, dtype=x.dtype, device=x.device)
        q, k = rotary(q, table), rotary(k, table)
        k, v = (t.repeat_interleave(config.heads // config.kv_heads, dim=1) for t in (k, v))
        score = q @ k.transpose(-1, -2) * config.head_size**-0.5
        future = torch.ones(score.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        return proj["o_proj"]((score.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2))


_QKV = ("q_proj", "k_proj", "v_proj")


class ReferenceDecoder(nn.Module):
    """tokens [B, S] -> logits [B, S, V]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden)
        self.layers = nn.ModuleList(ReferenceLayer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.hidden, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))
