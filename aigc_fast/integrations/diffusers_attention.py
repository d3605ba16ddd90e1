"""What takes the place of attention in diffusers: of any model, and of those known well."""

import inspect
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor
from torch.overrides import TorchFunctionMode

from aigc_fast import ops
from aigc_fast.integrations._patching import Assignment, Replacement, Unfit, become
from aigc_fast.integrations.diffusers_layers import GroupNorm, check_group_norm
from aigc_fast.ops.linear import mkl_lags


class OurAttention(TorchFunctionMode):
    """Where torch's attention is called, ours runs. So does it where diffusers' dispatcher is,
    unless somebody chose another backend than torch's, its default."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            func = ops.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


class AnyAttention(Replacement):
    """Of any model whose processor, which goes on with its work, calls torch's or diffusers'."""

    uses = "scaled_dot_product_attention"

    @classmethod
    def assignments(cls, module: Any) -> Iterable[Assignment]:
        if not mkl_lags():
            raise Unfit("torch's own attention is as fast on this machine")
        processor = type(module.processor)
        code = getattr(inspect.unwrap(processor.__call__), "__code__", None)
        called = {"scaled_dot_product_attention", "dispatch_attention_fn"}
        if code is None or called.isdisjoint(code.co_names):
            raise Unfit(f"its processor is {processor.__name__}")
        backend = getattr(module.processor, "_attention_backend", None)
        if backend not in (None, "native"):
            raise Unfit(f"its attention is that of {backend}")
        yield from super().assignments(module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # The mode costs 4 us for each function of torch: nothing beside attention that is worth it.
        if not any(isinstance(x, Tensor) and x.is_cpu for x in (*args, *kwargs.values())):
            return super().forward(*args, **kwargs)
        with OurAttention():
            return super().forward(*args, **kwargs)


class Attention(Replacement):
    """That of U-Nets, autoencoders and DiT."""

    uses = "scaled_dot_product_attention, group_norm_act in its norm"
    processor_name = "AttnProcessor2_0"

    @classmethod
    def assignments(cls, module: Any) -> Iterable[Assignment]:
        if (name := type(module.processor).__name__) != cls.processor_name:
            raise Unfit(f"its processor is {name}")
        if module.group_norm is not None:
            check_group_norm(module.group_norm)
            yield become(GroupNorm, module.group_norm)
        yield from super().assignments(module)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        # Another processor may have been chosen since.
        plain = type(self.processor).__name__ == self.processor_name
        if not plain or self.spatial_norm is not None or attention_mask is not None or kwargs:
            if temb is not None:  # which not every processor takes
                kwargs["temb"] = temb
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        x, context = hidden_states, encoder_hidden_states
        if x.dim() == 4:
            x = x.flatten(2).transpose(1, 2)
        if self.group_norm is not None:
            x = self.group_norm(x.transpose(1, 2)).transpose(1, 2)
        if context is None:
            context = x
        elif self.norm_cross:
            context = self.norm_encoder_hidden_states(context)
        query, key, value = (
            to(of).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for to, of in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        if self.norm_q is not None:
            query = self.norm_q(query)
        if self.norm_k is not None:
            key = self.norm_k(key)
        out = ops.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        out = self.to_out[1](self.to_out[0](out.to(query.dtype)))
        if hidden_states.dim() == 4:
            out = out.transpose(1, 2).reshape(hidden_states.shape)
        if self.residual_connection:
            out = out + hidden_states
        return out if self.rescale_output_factor == 1 else out / self.rescale_output_factor


class _Attention(Replacement):
    """Does the work of one processor of diffusers."""

    absorbs = ("norm_q", "norm_k")
    processor_name = ""

    @classmethod
    def assignments(cls, module: Any) -> Iterable[Assignment]:
        if (name := type(module.processor).__name__) != cls.processor_name:
            raise Unfit(f"its processor is {name}")
        yield from super().assignments(module)

    def _leaves(self, kwargs: dict[str, Any]) -> bool:
        """Whether a call is the stock class's: another processor may have been chosen since."""
        return (
            type(self.processor).__name__ != self.processor_name
            or self.fused_projections
            or bool(kwargs)
        )


def angles(rotary: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """diffusers gives every angle twice, once for each feature of a pair."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = (t[..., ::2].to(x.device, dtype).contiguous() for t in rotary)
    return cos, sin


def normed_and_turned(x: Tensor, norm: Any, cos: Tensor, sin: Tensor) -> Tensor:
    """Query or key heads (batch, tokens, heads, head_dim)."""
    if x.dtype != norm.weight.dtype:
        return ops.apply_rotary(norm(x), cos, sin, interleaved=True)
    weight, heads = norm.weight, x.shape[2]
    return ops.qk_norm_rotary(x, weight, weight, cos, sin, heads, norm.eps, interleaved=True)


class FluxAttention(_Attention):
    uses = "qk_norm_rotary"
    processor_name = "FluxAttnProcessor"

    @classmethod
    def assignments(cls, module: Any) -> Iterable[Assignment]:
        yield from super().assignments(module)
        if module.norm_q.weight is None:
            raise Unfit("its norms have no weight")

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        if image_rotary_emb is None or self._leaves(kwargs):
            return super().forward(
                hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, **kwargs
            )
        cos, sin = angles(image_rotary_emb, hidden_states)
        tokens = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        query, key, value = (
            to(hidden_states).unflatten(-1, (-1, self.head_dim))
            for to in (self.to_q, self.to_k, self.to_v)
        )
        query = normed_and_turned(query, self.norm_q, cos[tokens:], sin[tokens:])
        key = normed_and_turned(key, self.norm_k, cos[tokens:], sin[tokens:])
        if encoder_hidden_states is not None:  # the tokens of the text come first
            text_query, text_key, text_value = (
                to(encoder_hidden_states).unflatten(-1, (-1, self.head_dim))
                for to in (self.add_q_proj, self.add_k_proj, self.add_v_proj)
            )
            cos, sin = cos[:tokens], sin[:tokens]
            text_query = normed_and_turned(text_query, self.norm_added_q, cos, sin)
            text_key = normed_and_turned(text_key, self.norm_added_k, cos, sin)
            query = torch.cat([text_query, query], dim=1)
            key = torch.cat([text_key, key], dim=1)
            value = torch.cat([text_value, value], dim=1)
        out = _attend(self.processor, query, key, value, attention_mask).flatten(2)
        if encoder_hidden_states is None:
            return out
        text, image = out[:, :tokens], out[:, tokens:]
        image = self.to_out[1](self.to_out[0](image.contiguous()))
        return image, self.to_add_out(text.contiguous())


def _attend(
    processor: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
    parallel: bool = True,
) -> Tensor:  # fmt: skip
    """diffusers' attention, with the backend that was chosen for the processor."""
    with OurAttention():
        out = dispatch_attention_fn(
            query, key, value, attn_mask=mask, backend=processor._attention_backend,
            parallel_config=processor._parallel_config if parallel else None,
        )  # fmt: skip
    return out.to(query.dtype)


class WanAttention(_Attention):
    """Its norms are over all heads."""

    uses = "rms_norm, apply_rotary"
    processor_name = "WanAttnProcessor"

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if self._leaves(kwargs):
            return super().forward(
                hidden_states, encoder_hidden_states, attention_mask, rotary_emb, **kwargs
            )
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        image = None
        if self.add_k_proj is not None:  # an image is in the prompt too, before 512 tokens of text
            image, context = context[:, :-512], context[:, -512:]
        query = _rms_norm(self.norm_q, self.to_q(hidden_states)).unflatten(2, (self.heads, -1))
        key = _rms_norm(self.norm_k, self.to_k(context)).unflatten(2, (self.heads, -1))
        value = self.to_v(context).unflatten(2, (self.heads, -1))
        if rotary_emb is not None:  # (1, tokens, 1, head_dim)
            cos, sin = (t[0, :, 0] for t in angles(rotary_emb, query))
            query = ops.apply_rotary(query, cos, sin, interleaved=True)
            key = ops.apply_rotary(key, cos, sin, interleaved=True)
        itself = encoder_hidden_states is None
        out = _attend(self.processor, query, key, value, attention_mask, itself).flatten(2)
        if image is not None:
            key = _rms_norm(self.norm_added_k, self.add_k_proj(image)).unflatten(
                2, (self.heads, -1)
            )
            value = self.add_v_proj(image).unflatten(2, (self.heads, -1))
            out = out + _attend(self.processor, query, key, value, None, False).flatten(2)
        return self.to_out[1](self.to_out[0](out))


def _rms_norm(norm: Any, x: Tensor) -> Tensor:
    return norm(x) if x.dtype != norm.weight.dtype else ops.rms_norm(x, norm.weight, norm.eps)
