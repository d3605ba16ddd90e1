"""The shape of a decoder."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder of the Llama type: RMS norms, rotary embedding, grouped heads, gated MLP.

    Attributes:
        vocab_size: number of tokens.
        hidden_size: width of the residual stream.
        num_layers: number of decoder layers.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides `num_heads`.
        head_dim: width of a head, even.
        intermediate_size: width of the MLP.
        rope_theta: base of the rotary frequencies.
        rms_norm_eps: added to the mean square in every norm.
        max_position_embeddings: the longest sequence the model was trained for.
        tie_word_embeddings: the output projection is the embedding itself.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "tie_word_embeddings" and not 0 < value < math.inf:
                raise ValueError(f"{field.name} must be positive and finite, got {value}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads, got {self.num_kv_heads} and {self.num_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}")
