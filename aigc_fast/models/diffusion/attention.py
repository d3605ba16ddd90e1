"""Attention in U-Nets and diffusion transformers; modules are named as diffusers names them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aigc_fast import ops
from aigc_fast.nn import Conv2d, GroupNormAct, LayerNorm, Linear
from aigc_fast.ops.scaled_dot_product_attention import has_attention

from .load import early_name


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query key^T / sqrt(head_dim)) value, each (batch, heads, tokens, head_dim).

    In training on a CPU for which `ops.scaled_dot_product_attention` has nothing of its own,
    bfloat16 is raised to float32, in which PyTorch's backward pass is the faster one: a step of a
    small transformer (128 tokens, two cores with AMX, all else bfloat16) took 0.18 s so, 0.31 s all
    in bfloat16 and 0.26 s all in float32.
    """
    lower = query.dtype == torch.bfloat16 and query.device.type == "cpu" and query.requires_grad
    if lower and not has_attention(query, key, value):
        with torch.autocast("cpu", enabled=False):  # which would lower them again
            y = F.scaled_dot_product_attention(query.float(), key.float(), value.float())
            return y.to(query.dtype)
    return ops.scaled_dot_product_attention(query, key, value)


class Attention(nn.Module):
    """Of tokens (batch, tokens, width) to themselves or to a context of another width.

    `load_state_dict` knows the names of early checkpoints too: query, key, value and proj_attn.
    """

    def __init__(
        self, width: int, heads: int, context_width: int | None = None, *, bias: bool = False
    ) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = Linear(width, width, bias=bias)
        self.to_k = Linear(context_width or width, width, bias=bias)
        self.to_v = Linear(context_width or width, width, bias=bias)
        self.to_out = nn.ModuleList([Linear(width, width)])
        self.register_load_state_dict_pre_hook(_rename_early)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        query, key, value = (
            to(of).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for to, of in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        out = attend(query, key, value)
        return self.to_out[0](out.transpose(1, 2).flatten(2))


def _rename_early(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in module.state_dict(prefix=prefix):
        if key not in state and early_name(key) in state:
            state[key] = state.pop(early_name(key))


class SpatialAttention(Attention):
    """x + attention of the pixels of x (batch, channels, height, width), normed by group."""

    def __init__(
        self, channels: int, heads: int, groups: int | None, eps: float, output_scale: float = 1.0
    ) -> None:
        super().__init__(channels, heads, bias=True)
        self.group_norm = None if groups is None else GroupNormAct(groups, channels, eps)
        self.output_scale = output_scale

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        normed = x if self.group_norm is None else self.group_norm(x)
        out = super().forward(normed.flatten(2).transpose(1, 2))
        out = out.transpose(1, 2).reshape(x.shape) + x
        return out if self.output_scale == 1 else out / self.output_scale


class GEGLU(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.proj(x).chunk(2, dim=-1)
        return ops.geglu(gate, up)


class GELU(nn.Module):
    """In the tanh form."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = Linear(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        return ops.gelu(self.proj(x), "tanh")


class FeedForward(nn.Module):
    """Through four times the width; `activation` is GEGLU or GELU."""

    def __init__(self, width: int, activation: type[GEGLU] | type[GELU]) -> None:
        super().__init__()
        inner = 4 * width
        # The middle one has diffusers' dropout, which is not used here.
        self.net = nn.Sequential(activation(width, inner), nn.Identity(), Linear(inner, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward."""

    def __init__(self, width: int, heads: int, context_width: int | None) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (LayerNorm(width) for _ in range(3))
        self.attn1 = Attention(width, heads)
        self.attn2 = Attention(width, heads, context_width)
        self.ff = FeedForward(width, GEGLU)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """x + transformer blocks over the pixels of x (batch, channels, height, width)."""

    def __init__(
        self,
        channels: int,
        heads: int,
        layers: int,
        context_width: int | None,
        groups: int,
        linear: bool,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.norm = GroupNormAct(groups, channels, 1e-6)
        self.proj_in, self.proj_out = (
            Linear(channels, channels) if linear else Conv2d(channels, channels, 1)
            for _ in range(2)
        )
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, heads, context_width) for _ in range(layers)
        )

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        tokens = self._project(self.proj_in, self.norm(x).flatten(2).transpose(1, 2))
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return self._project(self.proj_out, tokens).transpose(1, 2).reshape(x.shape) + x

    def _project(self, projection: nn.Module, tokens: Tensor) -> Tensor:
        # A 1x1 convolution is a linear layer over tokens; its weight has two dimensions of one.
        weight = projection.weight.flatten(1)  # type: ignore[operator]
        return ops.linear(tokens, weight, projection.bias)  # type: ignore[arg-type]
