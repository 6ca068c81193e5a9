"""A decoder of Llama's shape in plain torch, as a user would have it; names as in Hugging Face's, fp64."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, HIDDEN, HEADS, KV_HEADS, WIDE, LAYERS = 48, 32, 4, 4, 40, 2
TOKENS = (4, 8)  # batch, sequence

PLAN = {  # transformers' base_model_tp_plan, and the head's
    "embed_tokens": "embedding_rowwise",
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
    "lm_head": "colwise_gather_output",
}
QK_NORMS = {f"layers.*.self_attn.{which}_norm": "replicated_with_grad_allreduce" for which in "qk"}
SEQUENCE_PLAN = {  # the same in its base_model_sp_plan
    **PLAN,
    "embed_tokens": "vocab_reduce_scatter",
    "layers.*.input_layernorm": "activation",
    "layers.*.self_attn": "module_allgather",
    "layers.*.self_attn.o_proj": "rowwise_reduce_scatter",
    "layers.*.post_attention_layernorm": "activation",
    "layers.*.mlp": "module_allgather",
    "layers.*.mlp.down_proj": "rowwise_reduce_scatter",
    "norm": "module_allgather",
}


class RMSNorm(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


class Attention(nn.Module):
    """Heads are counted by what the projections return, so that a shard has its own number of them."""

    def __init__(self, kv_heads: int, bias: bool, qk_norm: bool):
        super().__init__()
        self.size = HIDDEN // HEADS
        self.q_proj = nn.Linear(HIDDEN, HIDDEN, bias=bias)
        self.k_proj, self.v_proj = (nn.Linear(HIDDEN, kv_heads * self.size, bias=bias) for _ in range(2))
        self.o_proj = nn.Linear(HIDDEN, HIDDEN, bias=bias)
        self.q_norm, self.k_norm = (RMSNorm(self.size) if qk_norm else nn.Identity() for _ in range(2))

    def forward(self, hidden_states: Tensor) -> Tensor:
        projected = (project(hidden_states) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (y.view(*y.shape[:2], -1, self.size).transpose(1, 2) for y in projected)
        # Keys know their position, or the bias of k_proj would have no gradient at all.
        k = self.k_norm(k) * torch.linspace(1, 2, k.shape[2], dtype=k.dtype).unsqueeze(1)
        y = F.scaled_dot_product_attention(self.q_norm(q), k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, bias: bool):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(HIDDEN, WIDE, bias=bias) for _ in range(2))
        self.down_proj = nn.Linear(WIDE, HIDDEN, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, kv_heads: int, bias: bool, qk_norm: bool):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(HIDDEN), RMSNorm(HIDDEN)
        self.self_attn, self.mlp = Attention(kv_heads, bias, qk_norm), MLP(bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    def __init__(self, *, seed=0, vocab=VOCAB, kv_heads=KV_HEADS, bias=False, qk_norm=False, tied=False, padding=None):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab, HIDDEN, padding_idx=padding)
        self.layers = nn.ModuleList(Layer(kv_heads, bias, qk_norm) for _ in range(LAYERS))
        self.norm = RMSNorm(HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, vocab, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight
        self.register_buffer("steps", torch.tensor(3 + seed))
        self.double()
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            centre = 1.0 if parameter.dim() == 1 else 0.0
            nn.init.normal_(parameter, centre, 0.3, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def tokens() -> Tensor:
    return torch.randint(0, VOCAB, TOKENS, generator=torch.Generator().manual_seed(1))


def loss_of(logits: Tensor) -> Tensor:
    target = torch.randint(0, VOCAB, TOKENS, generator=torch.Generator().manual_seed(2))
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def whole(**options) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of the unsharded model."""
    model = Llama(**options)
    logits = model(tokens())
    loss_of(logits).backward()
    return logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def far(ours: Tensor, exact: Tensor, whole: Tensor | None = None) -> float:
    """Largest difference in units in the last place of the largest value, of `whole` where exact is a shard of it."""
    largest = (exact if whole is None else whole).abs().max()
    return ((ours - exact).abs().max() / (torch.finfo(exact.dtype).eps * largest)).item()
