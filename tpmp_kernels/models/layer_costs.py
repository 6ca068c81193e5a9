"""What each layer of a decoder costs, modelled from its shapes: for `partition`, on any machine and without torch.

T tokens in a microbatch of sequences of S, H hidden, A = heads x head size, K = kv_heads x head size, V padded
vocabulary; A, K, ffn and V are those of one of tp ranks. In FLOP, 2 for each multiply and add of a matrix product;
norms, activations and look-ups count nothing, so the embedding costs no time:

                    F                    B                      W
    layer, linears  2 T P                2 T P                  2 T P        P = H (2 A + 2 K + 3 ffn), its weights
    attention       4 T A (S + 1) / 2    5/2 of that            -            half the scores, as it is causal
    head and loss   2 T V H              2 x 2 T V H            2 T V H      (ops.linear_cross_entropy)

B is dY @ W and W is dY^T @ X, of the same size (Narayanan et al., arXiv 2104.04473, appendix). Attention has two
products forward and five backward, of which one makes the scores again (Dao et al., FlashAttention, arXiv 2205.14135);
the loss makes the logits again in B. Elements kept for backward, of which sequence parallelism cuts the 4 H and H:

    layer  T (4 H + 2 A + 2 K + 3 ffn)      inputs of both norms and their outputs, q, k, v, attention's output, the
                                            three of the gated MLP
    head   T (H + H)                        input of the norm, and its output, whole
"""

from dataclasses import dataclass
from functools import partial

from tpmp_kernels.models.config import ModelConfig
from tpmp_kernels.pipeline.partition import LayerCost

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Microbatch:
    """What one rank of tp sees of a microbatch: `batch` sequences of `sequence` tokens. dtype: of the parameters."""

    batch: int
    sequence: int
    tp: int = 1
    sequence_parallel: bool = False
    dtype: str = "float32"

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence


def layer_costs(config: ModelConfig, seen: Microbatch) -> list[LayerCost]:
    """Costs of embed_tokens, layers.0 .. layers.n-1 and lm_head (norm, head and loss), on one rank.

    Times in GFLOP; message, activation and parameters in MB (1e6 bytes). Parameters are counted with an fp32 main copy
    of narrower ones, the gradient and both moments of AdamW (training/optimizer.py). A tied weight is counted at both
    ends, which hold it both.
    """
    rows, cost = config.padded_vocab // seen.tp * config.hidden, partial(_cost, seen)
    border, head, layer = _cut(seen) * config.hidden, 2 * seen.tokens * rows, _layer(config, seen)
    return [
        cost("embed_tokens", parameters=rows, message=border),
        *(cost(f"layers.{number}", **layer, message=border) for number in range(config.layers)),
        cost(
            "lm_head",
            F=head,
            B=2 * head,
            W=head,
            activation=border + seen.tokens * config.hidden,
            parameters=rows + config.hidden,
        ),
    ]


def _layer(config: ModelConfig, seen: Microbatch) -> dict[str, float]:
    """F, B and W in FLOP; activation and parameters in elements."""
    kv_heads = max(1, config.kv_heads // seen.tp)  # one that ranks share is held by each
    query, key, ffn = config.hidden // seen.tp, kv_heads * config.head_size, config.ffn // seen.tp
    weights = config.hidden * (2 * query + 2 * key + 3 * ffn)
    linears = 2 * seen.tokens * weights
    scores = 4 * seen.tokens * query * (seen.sequence + 1) / 2
    return {
        "F": linears + scores,
        "B": linears + 2.5 * scores,
        "W": linears,
        "activation": _cut(seen) * 4 * config.hidden + seen.tokens * (2 * query + 2 * key + 3 * ffn),
        "parameters": weights + 2 * config.hidden,
    }


def _cut(seen: Microbatch) -> float:
    """Tokens that a rank holds between the tensor-parallel layers."""
    return seen.tokens / (seen.tp if seen.sequence_parallel else 1)


def _cost(seen: Microbatch, name: str, *, F=0.0, B=0.0, W=0.0, message=0, activation=0, parameters) -> LayerCost:
    """From FLOP and elements to GFLOP and MB."""
    size = BYTES[seen.dtype]
    wide = max(size, 4)  # of the main copy, if there is one, of the gradient and of the two moments
    held = size + (wide if size < wide else 0) + 3 * wide
    memory = {"message": message * size, "activation": activation * size, "parameters": parameters * held}
    return LayerCost(name, F / 1e9, B / 1e9, W / 1e9, **{what: nbytes / 1e6 for what, nbytes in memory.items()})
