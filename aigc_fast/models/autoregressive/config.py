"""The shape of a decoder."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

from aigc_fast.ops._checks import check_choice

from .arguments import check_fields
from .rope import RopeScaling

Norm = Literal["rms", "layer"]
Activation = Literal["swiglu", "geglu_tanh", "gelu_tanh"]


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer. The defaults are those of Llama.

    Attributes:
        vocab_size: number of tokens.
        hidden_size: width of the residual stream.
        num_layers: number of decoder layers.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides `num_heads`.
        head_dim: width of a head, even.
        intermediate_size: width of the MLP.
        rope_theta: base of the rotary frequencies.
        rms_norm_eps: added to the mean square (in a layer norm, to the variance) in every norm.
        max_position_embeddings: the longest sequence the model takes, scaling included.
        tie_word_embeddings: the output projection is the embedding itself.
        norm: RMS norm, or layer norm with a bias.
        pre_norms, post_norms: whether attention and MLP have a norm before them, and behind them.
        qk_norm: an RMS norm over each head of query and key, before the rotation.
        joint_qk_norm: that norm is over all heads of query together, and over all of key.
        activation: silu(gate) * up, gelu(gate) * up, or gelu without a gate; tanh approximation.
        num_experts: MLPs of a layer, each of `intermediate_size`; None is one for all tokens.
        experts_per_token: those that a token is sent to, the likeliest by a softmax over all.
        normalize_experts: their factors are made to add up to one.
        qkv_bias, output_bias, mlp_bias: which projections have a bias.
        learned_positions: an embedding of the position instead of the rotation.
        rope_layers: for each layer whether query and key rotate; () where all do.
        rotary_dim: the leading features of a head that rotate, even; None is all of them.
        rope_scaling: how the rotary frequencies are stretched.
        local_rope_theta: the base in the layers with a window, whose frequencies are not stretched;
            None: they rotate as the others do.
        windows: for each layer how many of the newest tokens it sees, itself included, or None
            for all; () where all layers see all.
        attention_scale: factor on the scores; None is 1 / sqrt(head_dim).
        attention_softcap: scores become softcap * tanh(score / softcap).
        logit_softcap: the same for the logits.
        logits_scaling: what the logits are divided by, before the softcap.
        embedding_scale: factor on the token embedding on its way in.
        residual_scale: factor on what attention and MLP add to the residual stream.
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
    norm: Norm = "rms"
    pre_norms: bool = True
    post_norms: bool = False
    qk_norm: bool = False
    joint_qk_norm: bool = False
    activation: Activation = "swiglu"
    num_experts: int | None = None
    experts_per_token: int | None = None
    normalize_experts: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    learned_positions: bool = False
    rope_layers: tuple[bool, ...] = ()
    rotary_dim: int | None = None
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float | None = None
    windows: tuple[int | None, ...] = ()
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    logits_scaling: float = 1.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        for field in fields(self):
            value = getattr(self, field.name)
            limit = 2**63 if type(value) is int else math.inf
            if type(value) in (int, float) and not 0 < value < limit:
                raise ValueError(f"{field.name} must be positive and finite, got {value}")
        self._check_sizes()
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads, got {self.num_kv_heads} and {self.num_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}")
        for name, choices in (("norm", get_args(Norm)), ("activation", get_args(Activation))):
            check_choice(name, getattr(self, name), choices)
        for name in ("windows", "rope_layers"):
            if (entries := getattr(self, name)) and len(entries) != self.num_layers:
                raise ValueError(
                    f"{name} must have one entry for each of {self.num_layers} layers, "
                    f"got {len(entries)}"
                )
        if any(window is not None and window < 1 for window in self.windows):
            raise ValueError(f"windows must be positive, got {self.windows}")
        if self.qk_norm and (self.learned_positions or not all(self.rope_layers)):
            raise ValueError(
                "qk_norm must be False with learned_positions and layers that do not rotate: it "
                "goes with a rotation"
            )
        if self.joint_qk_norm and not self.qk_norm:
            raise ValueError("qk_norm must be True with joint_qk_norm")
        self._check_experts()
        if self.rotary_dim is None:
            object.__setattr__(self, "rotary_dim", self.head_dim)
        self._check_rotary(self.rotary_dim or self.head_dim)

    def _check_sizes(self) -> None:
        """Keeps the number of elements of every weight within what a tensor can count."""
        heads = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        inner = 2 * self.intermediate_size * (self.num_experts or 1)
        widest = max(self.vocab_size, heads, inner)
        if self.learned_positions:
            widest = max(widest, self.max_position_embeddings)
        if widest * self.hidden_size >= 2**62:
            raise ValueError(
                f"a weight of {widest} by hidden_size = {self.hidden_size} has too many elements"
            )

    def _check_experts(self) -> None:
        experts, per_token = self.num_experts, self.experts_per_token
        if experts is None and per_token is None:
            return
        if experts is None or per_token is None or per_token > experts:
            raise ValueError(
                f"experts_per_token must be at most num_experts, got {per_token} and {experts}"
            )
        if self.mlp_bias or self.activation == "gelu_tanh":
            raise ValueError("num_experts must be None with mlp_bias and without a gate")

    def _check_rotary(self, rotary_dim: int) -> None:
        if rotary_dim % 2 or rotary_dim > self.head_dim:
            raise ValueError(
                f"rotary_dim must be even and at most head_dim = {self.head_dim}, got {rotary_dim}"
            )
        scaling = self.rope_scaling
        if scaling is None:
            return
        sets = {"divisors": ("divisors",), "longrope": ("divisors", "long_divisors")}
        for name in sets.get(scaling.kind, ()):
            if len(divisors := getattr(scaling, name)) != rotary_dim // 2:
                raise ValueError(
                    f"rope_scaling.{name} must be {rotary_dim // 2}, one for each pair of "
                    f"features, got {len(divisors)}"
                )
        if scaling.kind == "dynamic" and rotary_dim == 2:
            raise ValueError("rotary_dim must be above 2 for dynamic scaling, got 2")
        if scaling.kind == "yarn" and self.rope_theta <= 1:
            raise ValueError(f"rope_theta must be above 1 for yarn, got {self.rope_theta}")

    def rotation(self, layer: int) -> int | None:
        """Which one of `rope.rotations` turns query and key of that layer, or None."""
        if self.learned_positions or (self.rope_layers and not self.rope_layers[layer]):
            return None
        slides = bool(self.windows) and self.windows[layer] is not None
        return int(slides and self.local_rope_theta is not None)

    def window(self, layer: int) -> int | None:
        """How many of the newest tokens that layer sees, or None for all there can be."""
        window = self.windows[layer] if self.windows else None
        return None if window is None or window >= self.max_position_embeddings else window
