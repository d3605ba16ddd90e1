"""What takes the place of embeddings, activations and norms of diffusers."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from aigc_fast import ops
from aigc_fast.integrations._patching import Assignment, Replacement, Unfit, stock_class
from aigc_fast.nn._replacing import runs_as_written
from aigc_fast.ops._autograd import wanted
from aigc_fast.ops._winograd import in_torch_order


def check_group_norm(norm: Any) -> None:
    if not isinstance(norm, nn.GroupNorm) or norm.weight is None:
        raise Unfit(f"its norm is {type(norm).__name__}")


def group_norm(norm: Any, x: Tensor, activation: str = "none") -> Tensor:
    """activation(norm(x)) in one operator. Queries of attention, (batch, channels, pixels), that
    lie pixel by pixel are read as channels_last."""
    args = norm.num_groups, norm.weight, norm.bias, norm.eps, activation
    if x.dim() == 3 and not x.is_contiguous():
        return ops.group_norm_act(x.unsqueeze(-1), *args).squeeze(-1)
    return ops.group_norm_act(x, *args)


class GroupNorm(Replacement):
    uses = "group_norm_act"
    weight: Tensor

    def forward(self, input: Tensor) -> Tensor:
        # Autocast brings an input of another dtype.
        if input.dtype != self.weight.dtype:
            return super().forward(input)
        return group_norm(self, input)


class Timesteps(Replacement):
    uses = "timestep_embedding"

    def forward(self, timesteps: Tensor) -> Tensor:
        return ops.timestep_embedding(
            timesteps,
            self.num_channels,
            flip_sin_to_cos=self.flip_sin_to_cos,
            downscale_freq_shift=self.downscale_freq_shift,
            scale=self.scale,
        )


class GEGLU(Replacement):
    uses = "geglu"

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs:
            return super().forward(hidden_states, *args, **kwargs)
        up, gate = self.proj(hidden_states).chunk(2, dim=-1)
        return ops.geglu(gate, up)


def product_and_gelu(linear: Any, x: Tensor, approximate: str) -> Tensor:
    """gelu(linear(x)), in the place of the product where nobody else may have that."""
    y = linear(x)
    own = stock_class(linear) is nn.Linear and runs_as_written(linear) and not wanted(y)
    return ops.gelu(y, approximate, inplace=own)


class GELU(Replacement):
    uses = "gelu"

    def forward(self, hidden_states: Tensor) -> Tensor:
        return product_and_gelu(self.proj, hidden_states, self.approximate)


class SwiGLU(Replacement):
    uses = "swiglu"
    absorbs = ("activation",)

    def forward(self, hidden_states: Tensor) -> Tensor:
        up, gate = self.proj(hidden_states).chunk(2, dim=-1)
        return ops.swiglu(gate, up)


class CausalConv3d(Replacement):
    """Of video autoencoders that decode frame by frame, with the frames before as a cache."""

    uses = "causal_conv3d"

    @classmethod
    def assignments(cls, module: Any) -> Iterable[Assignment]:
        if module._padding[4] != module.kernel_size[0] - 1:
            raise Unfit("it puts no frames before the first")
        yield from super().assignments(module)

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        padding = self._padding[2], self._padding[0]
        history = cache_x if self.kernel_size[0] > 1 else None
        weight = self.weight  # once: a parametrization computes it anew each time
        y = ops.causal_conv3d(x, weight, self.bias, self.stride, padding, history=history)
        flat = in_torch_order(y.flatten(2, 3), x[:, :, 0], weight[:, :, 0])
        return flat.unflatten(2, y.shape[2:4])


class RMSNorm(Replacement):
    uses = "rms_norm"
    weight: Tensor

    @classmethod
    def assignments(cls, module: Any) -> Iterable[Assignment]:
        if module.weight is None or module.bias is not None:
            raise Unfit("it has a bias, or no weight")
        yield from super().assignments(module)

    def forward(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype != self.weight.dtype:
            return super().forward(hidden_states)
        if hidden_states.dim() == 4 and not hidden_states.is_contiguous():
            # Heads of attention, moved in front of the tokens: normed where they lie.
            heads = hidden_states.transpose(1, 2)
            return ops.rms_norm(heads, self.weight, self.eps).transpose(1, 2)
        return ops.rms_norm(hidden_states, self.weight, self.eps)


class FP32LayerNorm(Replacement):
    """In float32 inside, as the operator is for every dtype."""

    uses = "layer_norm"

    def forward(self, inputs: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        mixed = any(p is not None and p.dtype != inputs.dtype for p in (weight, bias))
        if mixed or inputs.dtype == torch.float64:
            return super().forward(inputs)
        return ops.layer_norm(inputs, weight, bias, self.eps)
