"""Attention in the models of transformers: its interface, and who calls it."""

import functools
import inspect
import re
import sys
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from aigc_fast import ops
from aigc_fast.integrations._patching import Assignment, Replacement, Unfit
from aigc_fast.integrations.transformers_cache import grow_in_place

#: under which transformers knows our attention
ATTENTION = "aigc_fast"
#: what a forward names that looks for the attention of its config
_ASKING = {"ALL_ATTENTION_FUNCTIONS", "get_interface", "config", "_attn_implementation"}


def asks_the_interface(cls: Any) -> bool:
    """Whether its forward calls the attention that its config names, and nothing in its file does
    else under the name of torch's than under ours."""
    code = getattr(cls.forward, "__code__", None)
    if code is None or not _ASKING.issubset(code.co_names):
        return False
    try:
        source = inspect.getsource(sys.modules[cls.__module__])
    except OSError:  # installed without it
        return False
    return not re.search(r"_attn_implementation (==|!=|in|not in) .*\bsdpa\b", source)


class Attention(Replacement):
    """Any that asks transformers' interface, where it finds ours under the name in its config. Its
    forward stays, and its cache grows in place."""

    uses = "decode_attention, scaled_dot_product_attention"
    #: what it takes the place of: few say when they want the weights, which "eager" gives
    replaces: tuple[str, ...] = ("sdpa",)

    @classmethod
    def assignments(cls, module: Any) -> Iterable[Assignment]:
        config = module.config
        if config._attn_implementation not in (*cls.replaces, ATTENTION):
            raise Unfit(f"its attention is {config._attn_implementation}")
        if config.output_attentions:
            raise Unfit("its config asks for attention weights")
        yield from super().assignments(module)
        # The property's setter would change the configs inside too.
        yield Assignment(config, "_attn_implementation_internal", ATTENTION)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        layer = getattr(self, "layer_idx", None)
        if layer is not None and self.config._attn_implementation == ATTENTION:
            for cache in (*args, *kwargs.values()):  # the argument has several names
                if isinstance(cache, Cache):
                    grow_in_place(cache, layer)
        return out


class RotaryAttention(Attention):
    uses = f"apply_rotary, {Attention.uses}"
    replaces = ("eager", "sdpa")
    capped = False

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        # Another attention may have been chosen since, with masks of another kind.
        if self.config._attn_implementation != ATTENTION:
            return super().forward(
                hidden_states, position_embeddings=position_embeddings,
                attention_mask=attention_mask, past_key_values=past_key_values, **kwargs,
            )  # fmt: skip
        query, key, value = self.project(hidden_states)
        if getattr(self, "use_rope", True):
            cos, sin = (_half(angles, len(query)) for angles in position_embeddings)
            query, key = ops.apply_rotary(query, cos, sin), ops.apply_rotary(key, cos, sin)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
            grow_in_place(past_key_values, self.layer_idx)
        out, weights = attention(
            self, query, key, value, attention_mask,
            dropout=self.attention_dropout if self.training else 0.0, scaling=self.scaling,
            softcap=self.attn_logit_softcapping if self.capped else None, **kwargs,
        )  # fmt: skip
        return self.o_proj(out.flatten(2)), weights

    def project(self, hidden_states: Tensor) -> Iterable[Tensor]:
        """Query, key and value, (batch, seq, heads, head_dim)."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape)
        key = self.k_proj(hidden_states).view(shape)
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)
        return query, key, self.v_proj(hidden_states).view(shape)


class FusedAttention(RotaryAttention):
    """Phi-3's: query, key and value are one product."""

    def project(self, hidden_states: Tensor) -> Iterable[Tensor]:
        packed = self.qkv_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        kv_heads = self.num_key_value_heads
        return packed.split((packed.shape[2] - 2 * kv_heads, kv_heads, kv_heads), 2)


class JointNormAttention(RotaryAttention):
    """OLMo-2's: query and key are normed over all heads together."""

    def project(self, hidden_states: Tensor) -> Iterable[Tensor]:
        query, key = (
            self.q_norm(self.q_proj(hidden_states)),
            self.k_norm(self.k_proj(hidden_states)),
        )
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        return (x.view(shape) for x in (query, key, self.v_proj(hidden_states)))


class UnclippedAttention(JointNormAttention):
    """OLMoE's, which may have a limit for queries, keys and values."""

    @classmethod
    def assignments(cls, module: Any) -> Iterable[Assignment]:
        if module.config.clip_qkv is not None:
            raise Unfit("its config has clip_qkv")
        yield from super().assignments(module)


class CappedAttention(RotaryAttention):
    """Gemma-2's. Gemma-3's has the setting too, and makes no use of it."""

    capped = True


def _half(angles: Tensor, batch: int) -> Tensor:
    """transformers gives every angle twice, once for each feature of a pair."""
    half = angles[..., : angles.shape[-1] // 2]
    return half[0] if len(half) == 1 and batch > 1 else half


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' interface of attention: (batch, heads, seq, head_dim) to (batch, seq, heads,
    head_dim), and the weights or None.

    One query for each sequence, without a gradient, goes to decode_attention, under any mask that
    transformers made of positions and padding; several without a mask go to
    `scaled_dot_product_attention`. Softcaps on longer queries, and weights, are plain
    PyTorch; all else is what transformers has for torch's attention.
    """
    if kwargs.get("output_attentions"):
        return _plain(module, query, key, value, attention_mask, dropout, scaling, softcap, kwargs)
    fits = (
        not torch.compiler.is_compiling()
        and dropout == 0
        and kwargs.get("position_bias") is kwargs.get("cache") is None
    )
    if (
        fits
        and query.shape[2] == 1
        and not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad))
        and (attention_mask is None or (hasattr(attention_mask, _VISIBLE) and key.shape[2] > 1))
        and key.shape == value.shape
        and len(query) == len(key)
        and query.dtype == key.dtype == value.dtype
    ):
        return _decode(query, key, value, attention_mask, scaling, softcap), None
    if softcap is not None:
        out, _ = _plain(
            module, query, key, value, attention_mask, dropout, scaling, softcap, kwargs
        )
        return out, None
    if fits and query.shape[2] > 1 and attention_mask is None:
        causal = kwargs.get("is_causal")
        out = ops.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=bool(getattr(module, "is_causal", True) if causal is None else causal),
            scale=scaling,
            enable_gqa=bool(query.shape[1] != key.shape[1]),  # to torch.jit.trace a tensor
        )
        return out.transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )


def mask(*, q_length: int, **kwargs: Any) -> Tensor | None:
    """transformers' mask of bools; that of a single query says which slots it sees."""
    found = sdpa_mask(q_length=q_length, **kwargs)
    if found is not None and q_length == 1 and not torch.compiler.is_compiling():
        found = found.contiguous()  # as generate asks for, which then passes on this very tensor
        seen = found[:, 0, 0]
        rank = torch.where(seen, seen.cumsum(-1) - 1, seen.shape[-1])
        slots = torch.arange(seen.shape[-1], dtype=torch.int32, device=seen.device).expand_as(seen)
        table = slots.new_zeros(len(seen), seen.shape[-1] + 1).scatter_(1, rank, slots)
        # On this tensor alone: a mask that comes from elsewhere, or was changed, has none.
        setattr(found, _VISIBLE, (seen.sum(-1), table[:, :-1]))
    return found


#: attribute of a mask: how many slots each sequence sees, and which
_VISIBLE = "_aigc_fast_visible"
AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, mask)


def _decode(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
    scale: float | None, softcap: float | None,
) -> Tensor:  # fmt: skip
    query, (batch, heads, slots, head_dim) = query.transpose(1, 2), key.shape
    if mask is None:
        key, value = key.transpose(1, 2), value.transpose(1, 2)
        lengths = _all(batch, slots, key.device)
        return ops.decode_attention(query, key, value, lengths, scale=scale, softcap=softcap)
    # Every slot is a page of the cache in place, so that the table can pass over any of them. In
    # memory the heads of a page lie further apart than the next page, so pages overlap.
    if key.stride() != value.stride() or key.stride(0) % key.stride(2):
        key, value = key.contiguous(), value.contiguous()
    sequence, head, slot, feature = key.stride()
    size = ((batch - 1) * (sequence // slot) + slots, 1, heads, head_dim)
    key, value = (x.as_strided(size, (slot, slot, head, feature)) for x in (key, value))
    lengths, table = getattr(mask, _VISIBLE)
    if batch > 1:
        table = table + _firsts(batch, sequence // slot, key.device)
    return ops.decode_attention(
        query, key, value, lengths, scale=scale, softcap=softcap, block_table=table
    )


@functools.lru_cache(maxsize=8)
def _all(batch: int, slots: int, device: torch.device) -> Tensor:
    """Every sequence sees all slots."""
    return torch.full((batch,), slots, device=device)


@functools.lru_cache(maxsize=8)
def _firsts(batch: int, apart: int, device: torch.device) -> Tensor:
    """The first page of each sequence."""
    return torch.arange(batch, dtype=torch.int32, device=device)[:, None] * apart


def _plain(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
    dropout: float, scale: float | None, softcap: float | None, options: dict,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, heads, queries, head_dim = query.shape
    kv_heads, slots = key.shape[1:3]
    scale = head_dim**-0.5 if scale is None else scale
    # The heads of a group are more rows of its one product.
    rows = query.reshape(batch, kv_heads, -1, head_dim)
    scores = (rows @ key.transpose(-1, -2)).view(batch, heads, queries, slots)
    if softcap is None:
        scores = scores * scale
    else:
        scores = torch.tanh(scores * (scale / softcap)) * softcap
    causal = options.get("is_causal")
    if mask is None and queries > 1 and (module.is_causal if causal is None else causal):
        mask = torch.ones(queries, slots, dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        if mask.dtype == torch.bool:
            # Added as transformers adds its own: a row of padding, which sees nothing, must not
            # become NaN, and its label may count, through the gradients of all its scores.
            low = torch.finfo(scores.dtype).min
            mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, low)
        scores = scores + mask
    wide = torch.promote_types(query.dtype, torch.float32)
    weights = F.softmax(scores, -1, dtype=wide).to(query.dtype)
    weights = F.dropout(weights, dropout, module.training)
    out = weights.view(batch, kv_heads, -1, slots) @ value
    return out.view(batch, heads, queries, -1).transpose(1, 2).contiguous(), weights
