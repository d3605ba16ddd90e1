"""A decoder-only language model on the library's ops."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aigc_fast import ops

from .cache import KVCache
from .config import DecoderConfig
from .weights import from_hf_state_dict, read_gguf_weights

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class _Step(NamedTuple):
    """What the layers of one forward pass share.

    cos, sin: (seq, head_dim // 2), or (batch, seq, head_dim // 2) where sequences differ.
    ends: int32 (batch,), the cached tokens with the new ones counted in; None where the new
        tokens are all there is to attend to.
    """

    cos: Tensor
    sin: Tensor
    cache: KVCache | None
    ends: Tensor | None


class Attention(nn.Module):
    """Grouped-query attention with rotary embedding; query, key and value are one product."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        heads, kv_heads = config.num_heads, config.num_kv_heads
        self.packed_sizes = (heads + kv_heads, kv_heads)
        self.rotated_sizes = (heads, kv_heads)
        self.is_grouped = heads != kv_heads
        self.head_dim = config.head_dim
        self.qkv_proj = nn.Linear(
            config.hidden_size, (heads + 2 * kv_heads) * config.head_dim, bias=False
        )
        self.o_proj = nn.Linear(heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor, step: _Step, layer: int) -> Tensor:
        batch, seq, _ = hidden.shape
        packed = self.qkv_proj(hidden).view(batch, seq, -1, self.head_dim)
        # Query and key heads lie side by side: one rotation for both. (split_with_sizes makes
        # both views in the time of one slice.)
        query_key, value = packed.split_with_sizes(self.packed_sizes, 2)
        rotated = ops.apply_rotary(query_key, step.cos, step.sin)
        query, key = rotated.split_with_sizes(self.rotated_sizes, 2)
        if step.cache is not None:
            keys, values = step.cache.keys[layer], step.cache.values[layer]
            ops.append_kv(key, value, keys, values, step.cache.lengths)
        if step.ends is None:
            out = F.scaled_dot_product_attention(
                query.transpose(1, 2),
                key.transpose(1, 2),
                value.transpose(1, 2),
                is_causal=True,
                enable_gqa=self.is_grouped,
            ).transpose(1, 2)
        else:
            out = ops.decode_attention(query, keys, values, step.ends)
        return self.o_proj(out.reshape(batch, seq, -1))


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up are one product."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden).chunk(2, dim=-1)
        return self.down_proj(ops.swiglu(gate, up))


class RMSNorm(nn.Module):
    """The weight of a norm; the residual is added on the way in where there is one."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.weight = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if residual is None:
            return ops.rms_norm(hidden, self.weight, self.eps), hidden
        return ops.add_rms_norm(hidden, residual, self.weight, self.eps)


class DecoderLayer(nn.Module):
    """Attention, then MLP. The residual stream travels beside the branch that is added to it,
    so that every addition is fused with the norm after it."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config)
        self.mlp = GatedMLP(config)

    def forward(
        self, hidden: Tensor, residual: Tensor | None, step: _Step, layer: int
    ) -> tuple[Tensor, Tensor]:
        hidden, residual = self.attention_norm(hidden, residual)
        hidden, residual = self.mlp_norm(self.attention(hidden, step, layer), residual)
        return self.mlp(hidden), residual


class DecoderLM(nn.Module):
    """A Llama-type decoder.

    Without a cache it is an ordinary differentiable module. With one, only the new tokens are
    computed, and no gradient goes through the layers.

    >>> model = DecoderLM.from_pretrained("model.gguf", dtype=torch.bfloat16)
    >>> cache = model.new_cache(batch_size=1, capacity=256)
    >>> logits = model(prompt, cache)       # (1, prompt length, vocab_size)
    >>> logits = model(next_token, cache)   # (1, 1, vocab_size)
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._rotary: tuple[Tensor, Tensor] | None = None

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], dtype: torch.dtype = torch.float32
    ) -> DecoderLM:
        """Reads a GGUF file of architecture `llama`, dequantised to `dtype`, on the CPU.

        Raises:
            OSError: the file cannot be opened.
            ValueError: the file is unsound or describes a model of another kind.
            TypeError: `dtype` is not a floating-point dtype that the ops take.
        """
        if dtype not in _DTYPES:
            raise TypeError(f"dtype must be one of {_DTYPES}, got {dtype}")
        config, state = read_gguf_weights(path, dtype)
        return cls._assemble(config, state)

    @classmethod
    def from_hf_state_dict(cls, config: DecoderConfig, state: Mapping[str, Tensor]) -> DecoderLM:
        """Builds the model from the state dict of a transformers `LlamaForCausalLM`.

        Args:
            state: `model.layers.0.self_attn.q_proj.weight` and so on; see weights.py.
        """
        return cls._assemble(config, from_hf_state_dict(config, state))

    @classmethod
    def _assemble(cls, config: DecoderConfig, state: dict[str, Tensor]) -> DecoderLM:
        # On meta the module costs no memory; the tensors of the state dict become its own.
        with torch.device("meta"):
            model = cls(config)
        model.load_state_dict(state, assign=True)
        return model.eval()

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """An empty cache of the model's dtype and device."""
        weight = self.norm.weight
        return KVCache(self.config, batch_size, capacity, dtype=weight.dtype, device=weight.device)

    def forward(self, token_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Scores of the next token after each of the given ones.

        Args:
            token_ids: int64 or int32 (batch, seq), seq at least 1.
            cache: what came before; the new tokens are added to it.

        Returns:
            (batch, seq, vocab_size) in the model's dtype.

        Raises:
            TypeError: `token_ids` is not an integer tensor.
            ValueError: `token_ids` has another shape, is empty, holds an id outside the
                vocabulary, or does not fit in the cache.
        """
        check_token_ids(token_ids, self.config)
        return self.logits(self.hidden_states(token_ids, cache))

    def logits(self, hidden: Tensor) -> Tensor:
        """The output projection, (..., hidden_size) to (..., vocab_size)."""
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return F.linear(hidden, head.weight)

    def hidden_states(self, token_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """The normalised states before the output projection, (batch, seq, hidden_size).

        As `forward`, but it trusts that the ids are inside the vocabulary: looking would make
        a GPU wait at every token.
        """
        with torch.set_grad_enabled(cache is None and torch.is_grad_enabled()):
            batch, seq = token_ids.shape
            step = self._step(batch, seq, cache)
            hidden, residual = self.embed_tokens(token_ids), None
            for index, layer in enumerate(self.layers):
                hidden, residual = layer(hidden, residual, step, index)
            hidden, _ = self.norm(hidden, residual)
            if cache is not None:
                cache.advance(seq)
            return hidden

    def _step(self, batch: int, seq: int, cache: KVCache | None) -> _Step:
        if cache is None:
            cos, sin = self._rotary_table(seq)
            return _Step(cos[:seq], sin[:seq], None, None)
        cache.check_room(batch, seq)
        cos, sin = self._rotary_table(cache.capacity)
        if cache.used == 0 and seq > 1:
            return _Step(cos[:seq], sin[:seq], cache, None)
        positions = cache.lengths[:, None]
        if seq > 1:
            positions = positions + torch.arange(seq, device=positions.device)
        # F.embedding is the gather with the least overhead, and takes int32 as it is.
        cos, sin = F.embedding(positions, cos), F.embedding(positions, sin)
        return _Step(cos, sin, cache, cache.lengths + seq)

    def _rotary_table(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin of every position below `length`, or below more.

        Not buffers: `model.to(torch.bfloat16)` must leave the angles exact.
        """
        weight = self.norm.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        table = self._rotary
        if table is not None and len(table[0]) >= length:
            if table[0].dtype == dtype and table[0].device == weight.device:
                return table
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"token_ids has {length} positions, above max_position_embeddings = "
                f"{self.config.max_position_embeddings}"
            )
        # A table made while generating must also serve training.
        with torch.inference_mode(False):
            dim = self.config.head_dim
            exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
            angles = torch.outer(
                torch.arange(length, dtype=torch.float64), self.config.rope_theta**-exponents
            )
            self._rotary = (
                angles.cos().to(weight.device, dtype),
                angles.sin().to(weight.device, dtype),
            )
        return self._rotary


def check_token_ids(token_ids: Any, config: DecoderConfig) -> None:
    """Raises TypeError or ValueError unless `token_ids` is (batch, seq) of known ids."""
    if not isinstance(token_ids, Tensor) or token_ids.dtype not in (torch.int64, torch.int32):
        kind = token_ids.dtype if isinstance(token_ids, Tensor) else type(token_ids).__name__
        raise TypeError(f"token_ids must be an int64 or int32 tensor, got {kind}")
    if token_ids.ndim != 2 or token_ids.numel() == 0:
        raise ValueError(
            f"token_ids must be (batch, seq) and not empty, got shape {tuple(token_ids.shape)}"
        )
    low, high = (int(bound) for bound in token_ids.aminmax())
    if low < 0 or high >= config.vocab_size:
        raise ValueError(
            f"token_ids must lie in [0, {config.vocab_size}), got {low if low < 0 else high}"
        )
