"""The layers of a decoder on the library's ops."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aigc_fast import ops
from aigc_fast.nn import Linear
from aigc_fast.nn.bias_act import of_dtype
from aigc_fast.ops._pages import NARROW

from .attention import attend
from .cache import KVCache
from .config import DecoderConfig
from .mlp import MLP, MixtureOfExperts


class Step(NamedTuple):
    """What the layers of one forward pass share.

    rotations: cos and sin, (seq, rotary_dim / 2), or (batch, seq, rotary_dim / 2) where sequences
        differ; those of `rope.rotations`, none in a model that does not rotate.
    ends: int32 (batch,), the cached tokens with the new ones counted in; None where the new
        tokens are all there is to attend to.
    """

    rotations: tuple[tuple[Tensor, Tensor], ...]
    cache: KVCache | None
    ends: Tensor | None


class Norm(nn.Module):
    """RMS norm or layer norm; the residual is added on the way in where there is one."""

    def __init__(self, config: DecoderConfig, width: int, kind: str) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if kind == "layer" else None

    def forward(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if residual is not None:  # which autocast leaves as wide as it was
            hidden = hidden.to(residual.dtype)
        if self.bias is None and residual is not None:
            return ops.add_rms_norm(hidden, residual, of_dtype(self.weight, hidden), self.eps)
        hidden = hidden if residual is None else hidden + residual
        return self.alone(hidden), hidden

    def alone(self, hidden: Tensor) -> Tensor:
        """The norm without an addition."""
        if self.bias is None:
            return ops.rms_norm(hidden, of_dtype(self.weight, hidden), self.eps)
        return F.layer_norm(hidden, self.weight.shape, self.weight, self.bias, self.eps)


class Attention(nn.Module):
    """Grouped-query attention; query, key and value are one product."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.packed_sizes = (heads + kv_heads, kv_heads)
        self.query_key_sizes = (heads, kv_heads)
        self.head_dim = head_dim
        self.layer = layer
        self.scale, self.softcap = config.attention_scale, config.attention_softcap
        self.window, self.rotation = config.window(layer), config.rotation(layer)
        self.qkv_proj = Linear(
            config.hidden_size, (heads + 2 * kv_heads) * head_dim, bias=config.qkv_bias
        )
        self.o_proj = Linear(heads * head_dim, config.hidden_size, bias=config.output_bias)
        self.joint_qk_norm = config.joint_qk_norm
        widths = [n * head_dim if self.joint_qk_norm else head_dim for n in (heads, kv_heads)]
        self.query_norm = Norm(config, widths[0], "rms") if config.qk_norm else None
        self.key_norm = Norm(config, widths[1], "rms") if config.qk_norm else None

    def forward(self, hidden: Tensor, step: Step) -> Tensor:
        batch, seq, _ = hidden.shape
        packed = self.qkv_proj(hidden).view(batch, seq, -1, self.head_dim)
        # Query and key heads lie side by side: one norm and rotation for both. (split_with_sizes
        # makes both views in the time of one slice.)
        query_key, value = packed.split_with_sizes(self.packed_sizes, 2)
        if self.rotation is not None:
            query_key = self._norm_and_rotate(query_key, *step.rotations[self.rotation])
        query, key = query_key.split_with_sizes(self.query_key_sizes, 2)
        keys, values = key, value
        of_cache: dict[str, Any] = {}
        if step.cache is not None:
            cached = step.cache.keys[self.layer], step.cache.values[self.layer]
            dtype = key.dtype if cached[0].dtype in NARROW else cached[0].dtype
            table, scales = step.cache.block_table, step.cache.scales_of(self.layer)
            options: dict[str, Any] = {"block_table": table, **scales}
            ops.append_kv(key.to(dtype), value.to(dtype), *cached, step.cache.lengths, **options)
            if step.ends is not None:
                keys, values, of_cache = *cached, options
        out = attend(
            query,
            keys,
            values,
            step.ends,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
            **of_cache,
        )
        return self.o_proj(out.reshape(batch, seq, -1))

    def _norm_and_rotate(self, query_key: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        query_norm, key_norm = self.query_norm, self.key_norm
        if query_norm is None or key_norm is None:
            return ops.apply_rotary(query_key, cos, sin)
        if not self.joint_qk_norm:
            weights, heads = (query_norm.weight, key_norm.weight), self.query_key_sizes[0]
            return ops.qk_norm_rotary(query_key, *weights, cos, sin, heads, query_norm.eps)
        query, key = query_key.split_with_sizes(self.query_key_sizes, 2)
        query = query_norm.alone(query.flatten(2)).view_as(query)
        key = key_norm.alone(key.flatten(2)).view_as(key)
        return ops.apply_rotary(torch.cat((query, key), 2), cos, sin)


class DecoderLayer(nn.Module):
    """Attention, then an MLP or experts. The residual stream travels beside the branch that is
    added to it, so that every addition is fused with the norm after it."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()

        def norm() -> Norm:
            return Norm(config, config.hidden_size, config.norm)

        self.attention_norm = norm() if config.pre_norms else None
        self.attention = Attention(config, layer)
        self.post_attention_norm = norm() if config.post_norms else None
        self.mlp_norm = norm() if config.pre_norms else None
        self.mlp = MLP(config) if config.num_experts is None else MixtureOfExperts(config)
        self.post_mlp_norm = norm() if config.post_norms else None
        self.residual_scale = config.residual_scale

    def forward(self, hidden: Tensor, residual: Tensor | None, step: Step) -> tuple[Tensor, Tensor]:
        hidden, residual = _add(self.attention_norm, hidden, residual)
        hidden = self.attention(hidden, step)
        if self.post_attention_norm is not None:
            hidden = self.post_attention_norm.alone(hidden)
        hidden, residual = _add(self.mlp_norm, self._scaled(hidden), residual)
        hidden = self.mlp(hidden)
        if self.post_mlp_norm is not None:
            hidden = self.post_mlp_norm.alone(hidden)
        return self._scaled(hidden), residual

    def _scaled(self, branch: Tensor) -> Tensor:
        return branch if self.residual_scale == 1.0 else branch * self.residual_scale


def _add(norm: Norm | None, branch: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the next branch sees, and the residual stream with `branch` added."""
    if norm is not None:
        return norm(branch, residual)
    hidden = branch if residual is None else branch.to(residual.dtype) + residual
    return hidden, hidden
