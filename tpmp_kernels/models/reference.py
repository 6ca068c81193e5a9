"""The same decoder in stock torch modules, unsharded and unfused: the oracle of tests and of the proof.

It shares nothing with decoder.py but the config, the parameter names and the whole masks of dropout, so that a mistake
in a sharded layer, a fused op or a collective cannot be in both.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from tpmp_kernels.models.config import ModelConfig
from tpmp_kernels.tensor_parallel.dropout import DropoutKey, dropout_mask


class ReferenceDropout(nn.Module):
    def __init__(self, place: int, p: float):
        super().__init__()
        self.place, self.p = place, p

    def forward(self, x: Tensor, keys: Sequence[DropoutKey]) -> Tensor:
        if not keys or self.p == 0:
            return x
        kept = [
            dropout_mask(part.shape, self.p, replace(key, layer=self.place), device=x.device)
            for key, part in zip(keys, x.chunk(len(keys)), strict=True)
        ]
        return x * torch.cat(kept) / (1 - self.p)


class ReferenceLayer(nn.Module):
    def __init__(self, number: int, config: ModelConfig):
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
        self.self_attn_dropout = ReferenceDropout(2 * number + 1, config.dropout)
        self.mlp_dropout = ReferenceDropout(2 * number + 2, config.dropout)

    def forward(self, x: Tensor, keys: Sequence[DropoutKey]) -> Tensor:
        x = x + self.self_attn_dropout(self.attention(self.input_layernorm(x)), keys)
        h, mlp = self.post_attention_layernorm(x), self.mlp
        y = mlp["down_proj"](nn.functional.silu(mlp["gate_proj"](h)) * mlp["up_proj"](h))
        return x + self.mlp_dropout(y, keys)

    def attention(self, x: Tensor) -> Tensor:
        config, proj = self.config, self.self_attn
        q, k, v = (proj[name](x).unflatten(-1, (-1, config.head_size)).transpose(1, 2) for name in _QKV)
        q, k = rotate(q, config.rope_theta), rotate(k, config.rope_theta)
        k, v = (t.repeat_interleave(config.heads // config.kv_heads, dim=1) for t in (k, v))
        score = q @ k.transpose(-1, -2) * config.head_size**-0.5
        future = torch.ones(score.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        return proj["o_proj"]((score.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2))


_QKV = ("q_proj", "k_proj", "v_proj")


def rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary positions of x [B, heads, S, D] by their definition: elements i and i + D/2 are one complex number, turned
    by position * theta^(-2i/D) (Su et al., RoFormer, arXiv 2104.09864)."""
    sequence, size = x.shape[-2:]
    frequency = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angle = torch.arange(sequence, dtype=torch.float64).unsqueeze(1) * frequency
    z = torch.complex(x[..., : size // 2], x[..., size // 2 :])
    turned = z * torch.polar(torch.ones_like(angle), angle).to(z.dtype)
    return torch.cat((turned.real, turned.imag), dim=-1)


class ReferenceDecoder(nn.Module):
    """tokens [B, S] -> logits [B, S, V].

    keys: of the microbatches that the tokens are made of, equal parts in order; their `layer` is filled in. Without
    any nothing is dropped.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden)
        self.embed_dropout = ReferenceDropout(0, config.dropout)
        self.layers = nn.ModuleList(ReferenceLayer(i, config) for i in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.hidden, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens: Tensor, keys: Sequence[DropoutKey] = ()) -> Tensor:
        return self.lm_head(self.hidden(tokens, keys))

    def hidden(self, tokens: Tensor, keys: Sequence[DropoutKey] = ()) -> Tensor:
        """[B, S, H]: what the head is given."""
        x = self.embed_dropout(self.embed_tokens(tokens), keys)
        for layer in self.layers:
            x = layer(x, keys)
        return self.norm(x)
