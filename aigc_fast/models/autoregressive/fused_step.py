"""The decoding step of a model with packed weights as one operator."""

from __future__ import annotations

from collections.abc import Iterator
from operator import is_
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from torch import Tensor, nn

from aigc_fast import ops
from aigc_fast.nn import QuantizedLinear
from aigc_fast.nn._replacing import runs_as_written

from .cache import KVCache
from .layers import MLP, Attention, DecoderLayer, Norm

if TYPE_CHECKING:
    from .decoder_lm import DecoderLM


class FusedStep:
    """What `ops.decoder_step` needs of a model.

    Attributes:
        weights: its argument of that name; empty where the model is not of its kind.
    """

    def __init__(self, model: DecoderLM) -> None:
        config, norm = model.config, model.norm
        self.weights: list[Tensor] = []
        self._tables, self._names = zip(*_looked_at(model), strict=True)
        self._found = [*map(dict.get, self._tables, self._names)]
        modules = (norm, *model.layers.modules())
        self._sized = [t for m in modules for t in (m._modules, m.__dict__, *_hooks(m))]
        self._size = sum(map(len, self._sized))
        self._weight, self._dtype = norm.weight, norm.weight.dtype
        self._eps, self._scale = config.rms_norm_eps, config.attention_scale
        layers = [layer for i, layer in enumerate(model.layers) if _is_plain(layer, i)]
        linears = [[m for m in _linears(layer) if _is_packed(m)] for layer in layers]
        rounding = {linear.quantize_activations for of_layer in linears for linear in of_layer}
        self._quantize_activations = rounding == {True}
        if (
            not len(layers) == len(model.layers) == config.num_layers
            or any(len(of_layer) < 4 for of_layer in linears)
            or len(rounding) > 1
            or not all(map(runs_as_written, modules))
            or type(norm) is not Norm
            or norm.weight.device.type != "cpu"
            or norm.weight.dtype == torch.float64
            or config.rotary_dim != config.head_dim
        ):
            return
        for layer, of_layer in zip(layers, linears, strict=True):
            qkv, output, gate_up, down = (linear.weight for linear in of_layer)
            before_attention, before_mlp = cast(Any, (layer.attention_norm, layer.mlp_norm))
            self.weights += [before_attention.weight, qkv, output]
            self.weights += [before_mlp.weight, gate_up, down]
        self.weights.append(norm.weight)

    def is_current(self) -> bool:
        """Whether the model still holds the very modules and weights that were looked at, no more
        of them, and no hook or forward of an object besides."""
        # Past nn.Module's attribute lookup, which would take many times as long.
        found = map(dict.get, self._tables, self._names)
        return sum(map(len, self._sized)) == self._size and all(map(is_, found, self._found))

    def has_its_dtype(self) -> bool:
        """Whether the model's is still the one it was made for: `.to` casts a parameter inside its
        object."""
        return self._weight.dtype == self._dtype

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


#: attributes that decide what a module computes
_SETTINGS: dict[type, tuple[str, ...]] = {
    QuantizedLinear: ("quantize_activations",),
    Attention: ("rotation", "softcap", "window"),
    MLP: ("activation",),
    DecoderLayer: ("residual_scale",),
}


def _hooks(module: nn.Module) -> tuple[dict, dict]:
    return module._forward_hooks, module._forward_pre_hooks


def _looked_at(model: DecoderLM) -> Iterator[tuple[dict[str, Any], str]]:
    """Where a step's parts are kept: a dictionary and a name in it, for each."""
    yield model._modules, "layers"
    yield model._modules, "norm"
    for module in (model.norm, *model.layers.modules()):
        for table in (module._modules, module._parameters, module._buffers):
            yield from ((table, name) for name in table)
        for name in _SETTINGS.get(type(module), ()):
            yield module.__dict__, name


def _linears(layer: DecoderLayer) -> tuple[nn.Module, ...]:
    attention, mlp = layer.attention, layer.mlp
    return attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj


def _is_plain(layer: nn.Module, place: int) -> TypeGuard[DecoderLayer]:
    """A layer of the Llama type with the cache of its place, no part of it of another class."""
    if type(layer) is not DecoderLayer:
        return False
    attention, mlp = layer.attention, layer.mlp
    return (
        type(attention) is Attention
        and attention.layer == place
        and attention.rotation == 0
        and type(mlp) is MLP
        and mlp.activation == "swiglu"
        and layer.post_attention_norm is None
        and layer.post_mlp_norm is None
        and layer.residual_scale == 1.0
        and type(layer.attention_norm) is type(layer.mlp_norm) is Norm
        and layer.attention_norm.bias is None
        and attention.query_norm is None
        and attention.window is None
        and attention.softcap is None
    )


def _is_packed(linear: nn.Module) -> TypeGuard[QuantizedLinear]:
    """With the codes that `ops.decoder_step` takes."""
    return (
        type(linear) is QuantizedLinear
        and linear.bias is None
        and linear.group_size == 32
        and linear.in_features % 32 == 0
    )
