"""The decoding step of a model with packed weights as one operator."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from aigc_fast import ops
from aigc_fast.nn import QuantizedLinear

from .cache import KVCache
from .layers import DecoderLayer

if TYPE_CHECKING:
    from .decoder_lm import DecoderLM


class FusedStep:
    """What `ops.decoder_step` needs of a model.

    Attributes:
        weights: its argument of that name; empty where the model is not of its kind.
    """

    def __init__(self, model: DecoderLM) -> None:
        config = model.config
        layers = [layer for layer in model.layers if isinstance(layer, DecoderLayer)]
        linears = [linear for layer in layers for linear in _linears(layer)]
        self.weights: list[Tensor] = []
        self._first, self._norm = layers[0].attention.qkv_proj, model.norm
        self._looked_at = self._state()
        self._eps, self._scale = config.rms_norm_eps, config.attention_scale
        self._quantize_activations = all(linear.quantize_activations for linear in linears)
        if (
            len(linears) < 4 * len(layers)
            or not all(map(_is_plain, layers))
            or model.norm.weight.device.type != "cpu"
            or model.norm.weight.dtype == torch.float64
            or config.learned_positions
            or config.rotary_dim != config.head_dim
            or any(linear.bias is not None for linear in linears)
            or any(linear.quantize_activations != self._quantize_activations for linear in linears)
        ):
            return
        for i, layer in enumerate(layers):
            qkv, output, gate_up, down = (m.weight for m in linears[4 * i : 4 * i + 4])
            self.weights += [layer.attention_norm.weight, qkv, output]
            self.weights += [layer.mlp_norm.weight, gate_up, down]
        self.weights.append(model.norm.weight)

    def _state(self) -> tuple[object, ...]:
        # Past nn.Module's attribute lookup, which would take 15 us a token.
        norm = self._norm._parameters["weight"]
        return (
            self._first._buffers.get("weight"),
            self._first.__dict__.get("quantize_activations"),
            None if norm is None else norm.dtype,
        )

    def is_current(self) -> bool:
        """Whether the model is still as it was looked at: `.to` changes it."""
        weight, *rest = self._state()
        return weight is self._looked_at[0] and (*rest,) == self._looked_at[1:]

    def __call__(self, hidden: Tensor, cache: KVCache, cos: Tensor, sin: Tensor) -> Tensor:
        """The normalised states after the last layer.

        Args:
            hidden: (batch, hidden_size), the embedded tokens.
            cos, sin: (positions, head_dim / 2).
        """
        return ops.decoder_step(
            hidden,
            self.weights,
            cache.in_turn,
            cache.lengths,
            cos,
            sin,
            block_table=cache.block_table,
            eps=self._eps,
            scale=self._scale,
            quantize_activations=self._quantize_activations,
            cache_scales=cache.scales,
        )


def _linears(layer: DecoderLayer) -> list[QuantizedLinear]:
    """Those of the four products of a layer that are packed."""
    mlp = layer.mlp
    products: list[nn.Module] = [layer.attention.qkv_proj, layer.attention.o_proj]
    products += [mlp.gate_up_proj] if mlp.activation == "swiglu" else []
    return [m for m in (*products, mlp.down_proj) if isinstance(m, QuantizedLinear)]


def _is_plain(layer: DecoderLayer) -> bool:
    """A layer of the Llama type."""
    attention = layer.attention
    return (
        layer.mlp.activation == "swiglu"
        and layer.post_attention_norm is None
        and layer.post_mlp_norm is None
        and layer.attention_norm.bias is None
        and attention.query_norm is None
        and attention.window is None
        and attention.softcap is None
    )
