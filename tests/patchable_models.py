"""Small decoders with the attribute names of Hugging Face's Llama and GPT-2, for what must be tested without them."""

import functools
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Output:
    """Of layers without a head: last_hidden_state alone."""

    last_hidden_state: Tensor | None = None
    loss: Tensor | None = None
    logits: Tensor | None = None


VOCAB, WIDTH, HIDDEN, HEADS, KV_HEADS, DIM = 53, 24, 40, 4, 2, 6


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def renamed(forward):
    """A decorator as Hugging Face has around its forwards: an argument's old name is still taken."""

    @functools.wraps(forward)
    def wrapper(*args, **kwargs):
        if "old_positions" in kwargs:
            kwargs["positions"] = kwargs.pop("old_positions")
        return forward(*args, **kwargs)

    return wrapper


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = wide(hidden_states)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)


class OneMoreRMSNorm(RMSNorm):
    """Gemma's: the weight counts from one."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) / self.weight * (1 + self.weight)


class MLP(nn.Module):
    def __init__(self, act_fn: nn.Module | None = None, bias: bool = False):
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, HIDDEN, bias=bias)
        self.up_proj = nn.Linear(WIDTH, HIDDEN, bias=bias)
        self.down_proj = nn.Linear(HIDDEN, WIDTH, bias=bias)
        self.act_fn = nn.SiLU() if act_fn is None else act_fn

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class RotaryEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("inv_freq", 100.0 ** (-torch.arange(0, DIM, 2) / DIM), persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angle = position_ids[..., None].float() * self.inv_freq.float()
        angle = torch.cat((angle, angle), -1)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


def turn(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + turn(q) * sin, k * cos + turn(k) * sin


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, HEADS * DIM, bias=False)
        self.k_proj = nn.Linear(WIDTH, KV_HEADS * DIM, bias=False)
        self.v_proj = nn.Linear(WIDTH, KV_HEADS * DIM, bias=False)
        self.o_proj = nn.Linear(HEADS * DIM, WIDTH, bias=False)

    @renamed
    def forward(self, hidden_states: Tensor, *, positions: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (
            layer(hidden_states).unflatten(-1, (-1, DIM)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *positions)
        y = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2).to(v.dtype))


class DecoderLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp = Attention(), MLP()
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(WIDTH), RMSNorm(WIDTH)

    def forward(self, x: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), old_positions=positions)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self, layers: int):
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(DecoderLayer() for _ in range(layers))
        self.norm, self.rotary_emb = RMSNorm(WIDTH), RotaryEmbedding()

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Output:
        x = self.embed_tokens(input_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=x.device)[None]
        positions = self.rotary_emb(x, position_ids)
        for layer in self.layers:
            x = layer(x, positions)
        return Output(self.norm(x))


class CausalLM(nn.Module):
    """What both models are above their layers."""

    def __init__(self, tied: Tensor):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=VOCAB)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.lm_head.weight = tied

    def loss_function(
        self, logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **kwargs
    ):
        target = F.pad(labels, (0, 1), value=ignore_index)[..., 1:] if shift_labels is None else shift_labels
        target = target.reshape(-1)
        reduction = "mean" if num_items_in_batch is None else "sum"
        logits = wide(logits).view(-1, vocab_size)
        loss = F.cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction)
        return loss if num_items_in_batch is None else loss / num_items_in_batch


class LlamaForCausalLM(CausalLM):
    def __init__(self, layers: int = 2):
        body = Body(layers)
        super().__init__(body.embed_tokens.weight)
        self.model = body

    def forward(self, input_ids, position_ids=None, labels=None, **kwargs) -> Output:
        hidden = self.model(input_ids, position_ids).last_hidden_state
        logits, loss = self.lm_head(hidden), None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return Output(hidden, loss, logits)


class CappedForCausalLM(LlamaForCausalLM):
    """Gemma 2's: the logits are capped."""

    def forward(self, input_ids, labels=None, **kwargs) -> Output:
        logits = torch.tanh(self.lm_head(self.model(input_ids).last_hidden_state) / 5.0) * 5.0
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return Output(None, loss, logits)


class Conv1D(nn.Module):
    def __init__(self, nf: int, nx: int):
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.empty(nx, nf).normal_(std=0.2)), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.nf)


class GPT2MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_fc, self.c_proj = Conv1D(HIDDEN, WIDTH), Conv1D(WIDTH, HIDDEN)
        self.act, self.dropout = nn.GELU(approximate="tanh"), nn.Dropout(0.1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc(hidden_states))))


class GPT2Body(nn.Module):
    def __init__(self, layers: int):
        super().__init__()
        self.wte = nn.Embedding(VOCAB, WIDTH)
        self.h = nn.ModuleList(nn.Sequential(nn.LayerNorm(WIDTH), GPT2MLP()) for _ in range(layers))
        self.ln_f = nn.LayerNorm(WIDTH)

    def forward(self, input_ids: Tensor) -> Output:
        x = self.wte(input_ids)
        for block in self.h:
            x = x + block(x)
        return Output(self.ln_f(x))


class GPT2LMHeadModel(CausalLM):
    def __init__(self, layers: int = 2):
        body = GPT2Body(layers)
        super().__init__(body.wte.weight)
        self.transformer = body

    def forward(self, input_ids, labels=None, **kwargs) -> Output:
        hidden = self.transformer(input_ids).last_hidden_state
        logits, loss = self.lm_head(hidden), None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return Output(hidden, loss, logits)
