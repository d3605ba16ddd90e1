"""The decoding step of a model with packed weights as one operator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import eq, is_
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from aigc_fast import ops
from aigc_fast.nn import QuantizedLinear
from aigc_fast.nn._replacing import runs_as_written

from .cache import KVCache
from .layers import Attention, DecoderLayer, Norm
from .mlp import MLP, MixtureOfExperts, Router

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
        self._sizes = [*map(len, self._sized)]
        self._weight, self._dtype = norm.weight, norm.weight.dtype
        layers = [layer for i, layer in enumerate(model.layers) if _is_known(layer, i)]
        if (
            not len(layers) == len(model.layers) == config.num_layers
            or len(set(map(_kind, layers))) != 1
            or not all(map(runs_as_written, modules))
            or not _is_rms(norm)
            or len({m.eps for m in modules if type(m) is Norm}) != 1
            or norm.weight.device.type != "cpu"
            or norm.weight.dtype == torch.float64
            or config.learned_positions
        ):
            return
        self.weights = [weight for layer in layers for weight in _weights(layer)]
        self.weights.append(norm.weight)
        self._options = {
            "eps": norm.eps,
            **_options(layers),
        }

    def is_current(self) -> bool:
        """Whether the model still holds the very modules and weights that were looked at, no more
        of them, and no hook or forward of an object besides."""
        # Past nn.Module's attribute lookup, which would take many times as long.
        found = map(dict.get, self._tables, self._names)
        sizes = map(len, self._sized)
        return all(map(eq, sizes, self._sizes)) and all(map(is_, found, self._found))

    def has_its_dtype(self) -> bool:
        """Whether the model's is still the one it was made for: `.to` casts a parameter inside its
        object."""
        return self._weight.dtype == self._dtype

    def __call__(
        self, hidden: Tensor, cache: KVCache, rotations: Sequence[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """The normalised states after the last layer.

        Args:
            hidden: (batch, hidden_size), the embedded tokens.
            rotations: cos and sin of every position, as of `rope.rotations`.
        """
        cos, sin = zip(*rotations, strict=True)
        return ops.decoder_step(
            hidden,
            self.weights,
            cache.in_turn,
            cache.lengths,
            cos,
            sin,
            block_table=cache.block_table,
            cache_scales=cache.scales,
            **self._options,
        )


#: attributes that decide what a module computes
_SETTINGS: dict[type, tuple[str, ...]] = {
    QuantizedLinear: ("quantize_activations",),
    Attention: ("rotation", "scale", "softcap", "window"),
    MLP: ("activation",),
    MixtureOfExperts: ("activation", "num_experts"),
    Router: ("normalize", "per_token"),
    Norm: ("eps",),
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


def _is_known(layer: nn.Module, place: int) -> TypeGuard[DecoderLayer]:
    """A layer that `ops.decoder_step` has, with the cache of its place, no part of it of another
    class."""
    if type(layer) is not DecoderLayer:
        return False
    attention, mlp = layer.attention, layer.mlp
    return (
        type(attention) is Attention
        and attention.layer == place
        and _is_mlp(mlp)
        and mlp.activation in ("swiglu", "geglu_tanh")
        and all(map(_is_packed, linears := _linears(layer)))
        and all(linear.bias is None for linear in linears[1:])
        and len({linear.quantize_activations for linear in linears}) == 1
        and all(_are_rms(*pair) for pair in _norms(layer))
        and (attention.query_norm is None or attention.rotation is not None)
    )


def _is_mlp(mlp: nn.Module) -> bool:
    """With a router of all its experts if it has one."""
    if type(mlp) is not MixtureOfExperts:
        return type(mlp) is MLP
    return type(mlp.router) is Router and len(mlp.router.weight) == mlp.num_experts


def _is_packed(linear: nn.Module) -> TypeGuard[QuantizedLinear]:
    """With the codes that `ops.decoder_step` takes."""
    return (
        type(linear) is QuantizedLinear and linear.group_size == 32 and linear.in_features % 32 == 0
    )


def _is_rms(norm: nn.Module | None) -> TypeGuard[Norm]:
    return type(norm) is Norm and norm.bias is None


def _are_rms(first: nn.Module | None, second: nn.Module | None) -> bool:
    """Two such norms, or none."""
    return (first is second is None) or (_is_rms(first) and _is_rms(second))


def _norms(layer: DecoderLayer) -> tuple[tuple[Norm | None, Norm | None], ...]:
    """Those before attention and MLP, behind them, of query and key."""
    attention = layer.attention
    return (
        (layer.attention_norm, layer.mlp_norm),
        (layer.post_attention_norm, layer.post_mlp_norm),
        (attention.query_norm, attention.key_norm),
    )


def _kind(layer: DecoderLayer) -> tuple:
    """What must be the same in all layers."""
    linears: Any = _linears(layer)
    return (
        *(norm is None for norm, _ in _norms(layer)),
        linears[0].bias is None,
        linears[0].quantize_activations,
        layer.attention.scale,
        layer.attention.softcap,
        layer.mlp.activation,
        layer.residual_scale,
        *_routing(layer),
    )


def _routing(layer: DecoderLayer) -> tuple[int, int, bool]:
    """How many experts there are, how many a token is sent to, and whether their factors are made
    to add up to one."""
    if not isinstance(layer.mlp, MixtureOfExperts):
        return 0, 0, True
    router = layer.mlp.router
    return layer.mlp.num_experts, router.per_token, router.normalize


def _weights(layer: DecoderLayer) -> list[Tensor]:
    """Of a layer the products', and those of the norms before them where there are such."""
    (before_attention, before_mlp), *_ = _norms(layer)
    qkv, output, gate_up, down = _linears(layer)
    parts: Any = (before_attention, qkv, output, before_mlp, gate_up, down)
    return [part.weight for part in parts if part is not None]


def _options(layers: Sequence[DecoderLayer]) -> dict[str, Any]:
    """Arguments of `ops.decoder_step` beside the weights; lists that say nothing are empty, and
    save 5 us of a step."""
    attentions = [layer.attention for layer in layers]
    qkv: list[Any] = [attention.qkv_proj for attention in attentions]
    _, after, of_heads = (
        [norm.weight for pair in pairs for norm in pair if norm is not None] or None
        for pairs in zip(*map(_norms, layers), strict=True)
    )
    rotations = [-1 if a.rotation is None else a.rotation for a in attentions]
    windows = [a.window or 0 for a in attentions]
    _, per_token, normalize = _routing(layers[0])
    routers: list[Any] = [layer.mlp.router for layer in layers if per_token]
    return {
        "quantize_activations": qkv[0].quantize_activations,
        "qkv_biases": None if qkv[0].bias is None else [linear.bias for linear in qkv],
        "query_key_norms": of_heads,
        "post_norms": after,
        "rotations": rotations if any(rotations) else [],
        "windows": windows if any(windows) else [],
        "scale": attentions[0].scale,
        "softcap": attentions[0].softcap,
        "residual_scale": layers[0].residual_scale,
        "activation": layers[0].mlp.activation,
        "routers": [router.weight for router in routers] or None,
        "experts_per_token": per_token,
        "normalize_experts": normalize,
    }
