"""What takes the place of the transformer blocks of diffusers, and of their adaLN norms."""

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from diffusers.hooks._helpers import TransformerBlockRegistry
from torch import Tensor, nn

from aigc_fast import ops
from aigc_fast.integrations._patching import Assignment, Replacement, Unfit
from aigc_fast.integrations.diffusers_layers import product_and_gelu

# Autocast mixes dtypes, which the operators refuse: what they do not take is plain PyTorch.


def modulated(norm: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """norm(x) * (1 + scale) + shift, scale and shift (batch, width)."""
    if x.dtype != scale.dtype:
        return norm(x) * (1 + scale[:, None]) + shift[:, None]
    return ops.modulated_layer_norm(x, scale, shift, norm.weight, norm.bias, norm.eps)


def gated(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    if not residual.dtype == x.dtype == gate.dtype:
        return residual + gate[:, None] * x
    return ops.gated_residual(residual, x, gate)


def second_half(
    residual: Tensor, branch: Tensor, modulation: Iterable[Tensor], norm: Any, feed_forward: Any
) -> Tensor:
    """What follows the attention `branch` in a block: its gated residual, norm, feed-forward.

    modulation: gate of the branch; shift, scale and gate of the feed-forward.
    """
    gate, shift, scale, gate_mlp = modulation
    if residual.dtype == branch.dtype == gate.dtype:
        normed, residual = ops.gated_residual_norm(
            residual, branch, gate, scale, shift, norm.weight, norm.bias, norm.eps
        )
    else:
        residual = gated(residual, branch, gate)
        normed = modulated(norm, residual, scale, shift)
    return gated(residual, feed_forward(normed), gate_mlp)


class AdaNorm(Replacement):
    uses = "modulated_layer_norm"
    absorbs = ("norm",)

    @classmethod
    def assignments(cls, module: Any) -> Iterable[Assignment]:
        if not isinstance(module.norm, nn.LayerNorm):
            raise Unfit(f"its norm is {type(module.norm).__name__}")
        yield from super().assignments(module)


class AdaLayerNormZero(AdaNorm):
    def forward(
        self,
        x: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        hidden_dtype: torch.dtype | None = None,
        emb: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        if self.emb is not None:
            emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        shift, scale, *rest = self.linear(self.silu(emb)).chunk(6, dim=1)
        return modulated(self.norm, x, scale, shift), *rest


class AdaLayerNormZeroSingle(AdaNorm):
    def forward(self, x: Tensor, emb: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
        return modulated(self.norm, x, scale, shift), gate


class SD35AdaLayerNormZeroX(AdaNorm):
    def forward(self, hidden_states: Tensor, emb: Tensor | None = None) -> tuple[Tensor, ...]:
        shift, scale, *rest, shift2, scale2, gate2 = self.linear(self.silu(emb)).chunk(9, dim=1)
        first = modulated(self.norm, hidden_states, scale, shift)
        return first, *rest, modulated(self.norm, hidden_states, scale2, shift2), gate2


class AdaLayerNormContinuous(AdaNorm):
    def forward(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        embedding = self.linear(self.silu(conditioning_embedding).to(x.dtype))
        scale, shift = embedding.chunk(2, dim=1)
        return modulated(self.norm, x, scale, shift)


class Block(Replacement):
    """A transformer's. diffusers' caches of blocks (`enable_cache`) know it by its class."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for stock in cls.__bases__:
            with contextlib.suppress(ValueError):  # of a class that no cache knows
                TransformerBlockRegistry._registry[cls] = TransformerBlockRegistry.get(stock)


class DiTBlock(Block):
    uses = "gated_residual_norm, gated_residual"
    absorbs = ("norm3",)

    @classmethod
    def assignments(cls, module: Any) -> Iterable[Assignment]:
        if module.norm_type != "ada_norm_zero":
            raise Unfit(f"its norm_type is {module.norm_type}")
        if module.attn2 is not None or module.pos_embed is not None or hasattr(module, "fuser"):
            raise Unfit("it has more than one attention and a feed-forward")
        yield from super().assignments(module)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        if self._chunk_size is not None or cross_attention_kwargs:
            return super().forward(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask,
                timestep, cross_attention_kwargs, class_labels, added_cond_kwargs,
            )  # fmt: skip
        normed, *modulation = self.norm1(
            hidden_states, timestep, class_labels, hidden_dtype=hidden_states.dtype
        )
        attended = self.attn1(
            normed,
            encoder_hidden_states=encoder_hidden_states if self.only_cross_attention else None,
            attention_mask=attention_mask,
        )
        return second_half(hidden_states, attended, modulation, self.norm3, self.ff)


class SD3Block(Block):
    uses = "gated_residual_norm, gated_residual"
    absorbs = ("norm2", "norm2_context")

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        if self._chunk_size is not None:
            return super().forward(
                hidden_states, encoder_hidden_states, temb, joint_attention_kwargs
            )
        options = joint_attention_kwargs or {}
        normed, *modulation = self.norm1(hidden_states, emb=temb)
        context_modulation = None
        if self.context_pre_only:
            context = self.norm1_context(encoder_hidden_states, temb)
        else:
            context, *context_modulation = self.norm1_context(encoder_hidden_states, emb=temb)
        attended, context = self.attn(
            hidden_states=normed, encoder_hidden_states=context, **options
        )
        if self.use_dual_attention:
            gate, *modulation, normed, second_gate = modulation
            hidden_states = gated(hidden_states, attended, gate)
            attended = self.attn2(hidden_states=normed, **options)
            modulation = [second_gate, *modulation]
        hidden_states = second_half(hidden_states, attended, modulation, self.norm2, self.ff)
        if context_modulation is None:
            return None, hidden_states
        return second_half(
            encoder_hidden_states, context, context_modulation, self.norm2_context, self.ff_context
        ), hidden_states


class FluxBlock(Block):
    uses = "gated_residual_norm, gated_residual"
    absorbs = ("norm2", "norm2_context")

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        normed, *modulation = self.norm1(hidden_states, emb=temb)
        context, *context_modulation = self.norm1_context(encoder_hidden_states, emb=temb)
        attended, context, *adapter = self.attn(
            hidden_states=normed,
            encoder_hidden_states=context,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        hidden_states = second_half(hidden_states, attended, modulation, self.norm2, self.ff)
        for of_images in adapter:
            hidden_states = hidden_states + of_images
        encoder_hidden_states = second_half(
            encoder_hidden_states, context, context_modulation, self.norm2_context, self.ff_context
        )
        return _in_range(encoder_hidden_states), hidden_states


class FluxSingleBlock(Block):
    uses = "gated_residual, gelu"
    absorbs = ("act_mlp",)

    @classmethod
    def assignments(cls, module: Any) -> Iterable[Assignment]:
        if type(module.act_mlp) is not nn.GELU:
            raise Unfit(f"its activation is {type(module.act_mlp).__name__}")
        yield from super().assignments(module)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        tokens = encoder_hidden_states.shape[1]
        residual = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        normed, gate = self.norm(residual, emb=temb)
        activated = product_and_gelu(self.proj_mlp, normed, self.act_mlp.approximate)
        attended = self.attn(
            hidden_states=normed,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        branch = self.proj_out(torch.cat([attended, activated], dim=2))
        out = _in_range(gated(residual, branch, gate))
        return out[:, :tokens], out[:, tokens:]


def _in_range(x: Tensor) -> Tensor:
    """diffusers keeps float16 finite here."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


class WanBlock(Block):
    """Its modulation is in float32, whatever the dtype of the model."""

    uses = "modulated_layer_norm, gated_residual"
    absorbs = ("norm1", "norm3")

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any
    ) -> Tensor:
        x, dtype = hidden_states, hidden_states.dtype
        modulation = (self.scale_shift_table + temb.float()).unbind(-2)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation
        normed = ops.modulated_layer_norm(x, scale, shift, eps=self.norm1.eps)
        attended = self.attn1(normed, None, None, rotary_emb)
        x = ops.gated_residual(x, attended.to(dtype), gate)
        x = x + self.attn2(self.norm2(x), encoder_hidden_states, None, None)
        normed = ops.modulated_layer_norm(x, scale_mlp, shift_mlp, eps=self.norm3.eps)
        return ops.gated_residual(x, self.ffn(normed).to(dtype), gate_mlp)
