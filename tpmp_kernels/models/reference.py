"""The same decoder in stock torch modules, unsharded and unfused: the oracle of tests and of the proof.

It shares nothing with decoder.py but the config and the parameter names, so that a mistake in a sharded layer, a fused
op or a collective cannot be in both.
"""

import torch
from torch import Tensor, nn

from tpmp_kernels.models.config import ModelConfig


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
