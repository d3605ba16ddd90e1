"""Group norm and the activation after it, with or without a scale and shift between them."""

from typing import Any

import torch
from torch import Tensor, nn

from aigc_fast import ops
from aigc_fast.nn.bias_act import of_dtype
from aigc_fast.ops.group_norm_act import activate, check_activation


class GroupNormAct(nn.GroupNorm):
    """nn.GroupNorm with the activation that follows it, in one operator: weight, bias as there.

    act: "none", "silu", "gelu" or "gelu_tanh", as for `ops.group_norm_act`.

    >>> GroupNormAct(32, 128, act="silu")  # nn.GroupNorm(32, 128), then nn.SiLU()
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        *args: Any,
        act: str = "none",
        **kwargs: Any,
    ) -> None:
        super().__init__(num_groups, num_channels, *args, **kwargs)
        check_activation(act)
        self.act = act

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = of_dtype(self.weight, input), of_dtype(self.bias, input)
        return ops.group_norm_act(input, self.num_groups, weight, bias, self.eps, self.act)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act}"


class ModulatedGroupNormAct(GroupNormAct):
    """act(group_norm(x) * (1 + scale) + shift), scale and shift (batch, channels): as a
    time embedding modulates a U-Net's residual block."""

    def forward(self, input: Tensor, scale: Tensor, shift: Tensor) -> Tensor:  # type: ignore[override]
        return modulated_group_norm_act(self, input, scale, shift, self.act)


def modulated_group_norm_act(
    norm: nn.GroupNorm, x: Tensor, scale: Tensor, shift: Tensor, act: str
) -> Tensor:
    """The forward of `ModulatedGroupNormAct` for any nn.GroupNorm; one operator but for a batch in
    channels_last, where it is one operator and plain PyTorch."""
    factor = 1 + scale
    batch, channels = x.shape[:2]
    if batch == 1 or x.is_contiguous():
        # As the channels of a single sample, each with a weight and a bias of its own.
        weight = factor if norm.weight is None else norm.weight * factor
        bias = shift if norm.bias is None else torch.addcmul(shift, norm.bias, factor)
        y = ops.group_norm_act(
            x.reshape(1, batch * channels, *x.shape[2:]),
            batch * norm.num_groups,
            of_dtype(weight.flatten(), x),
            of_dtype(bias.flatten(), x),
            norm.eps,
            act,
        )
        return y.reshape(x.shape)
    y = ops.group_norm_act(
        x, norm.num_groups, of_dtype(norm.weight, x), of_dtype(norm.bias, x), norm.eps
    )
    view = (batch, channels, *[1] * (x.dim() - 2))
    y = torch.addcmul(shift.to(x.dtype).view(view), y, factor.to(x.dtype).view(view))
    return activate(y, check_activation(act))
