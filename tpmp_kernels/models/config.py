"""The shape of a decoder: plain numbers, no torch, so that a config can be read, checked and planned anywhere."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-style decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

    vocab_size: int = 256
    """Number of token ids; 256 for byte tokens."""
    vocab_multiple: int = 0
    """Embedding and head have rows for a multiple of this; 0 takes 128, or for a smaller vocabulary a power of two."""
    hidden: int = 128
    """Width of the residual stream, in features."""
    layers: int = 4
    """Number of decoder layers."""
    heads: int = 4
    """Number of query heads; each is hidden / heads wide."""
    kv_heads: int = 2
    """Number of key and value heads; every one serves heads / kv_heads query heads."""
    ffn: int = 352
    """Width of the SwiGLU layer between its two projections, in features."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    dropout: float = 0.0
    """Share of elements dropped, in training alone, of the embedding and of what each attention and MLP adds to it."""
    tie_embeddings: bool = False
    """Let the head use the embedding's weight."""

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding and of the head, the same for every tp: those behind the vocabulary are zeros."""
        multiple = self.vocab_multiple or min(128, 2 ** (self.vocab_size.bit_length() - 1))
        return -(-self.vocab_size // multiple) * multiple

    @property
    def head_size(self) -> int:
        """Features of one head."""
        return self.hidden // self.heads
