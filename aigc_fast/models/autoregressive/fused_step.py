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
        self._module = model.layers[0].attention.qkv_proj
        self._first = self._module.weight
        self._dtype = model.norm.weight.dtype
        self._eps, self._scale = config.rms_norm_eps, config.attention_scale
        self.weights: list[Tensor] = []
        linears = [m for layer in model.layers for m in _linears(layer)]
        if (
            self._first.device.type != "cpu"
            or self._dtype == torch.float64
            or config.learned_positions
            or config.rotary_dim not in (None, config.head_dim)
            or not all(map(_is_plain, model.layers))
            or not all(isinstance(linear, QuantizedLinear) for linear in linears)
            or any(m.bias is not None or m.in_features % m.group_size for m in linears)
            or len({m.quantize_activations for m in linears}) != 1
        ):
            return
        self._quantize_activations = linears[0].quantize_activations
        for layer in model.layers:
            qkv, output, gate_up, down = (linear.weight for linear in _linears(layer))
            self.weights += [layer.attention_norm.weight, qkv, output]
            self.weights += [layer.mlp_norm.weight, gate_up, down]
        self.weights.append(model.norm.weight)

    def is_of(self, model: DecoderLM) -> bool:
        """Whether the model still has the weights that were looked at: `.to` changes them."""
        # Past nn.Module's attribute lookup, which would take 15 us a token.
        return (
            self._module._buffers.get("weight") is self._first
            and model._modules["norm"]._parameters["weight"].dtype == self._dtype
        )

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
            eps=self._eps,
            scale=self._scale,
            quantize_activations=self._quantize_activations,
        )


def _linears(layer: DecoderLayer) -> list[nn.Module]:
    attention, mlp = layer.attention, layer.mlp
    if mlp.activation != "swiglu":
        return [attention.qkv_proj, attention.o_proj, mlp.down_proj]
    return [attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj]


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
