"""Layers with an equalised learning rate: weights are kept at unit variance and scaled in use."""

import torch
from torch import Tensor, nn

from aigc_fast import ops
from aigc_fast.ops._activations import resolve
from aigc_fast.ops._checks import check_positive


class EqualizedLinear(nn.Module):
    """bias_act(x @ weight.T * lr_mul / sqrt(in_features), bias * lr_mul, act).

    weight (out_features, in_features) starts at the standard deviation 1 / lr_mul, bias
    (out_features,) at bias_init.
    lr_mul: factor on the learning rate of both.
    act:    as for `ops.bias_act`, with its default gain.

    Source: Karras et al. 2017, arXiv:1710.10196, section 4.1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        act: str = "linear",
        *,
        bias_init: float = 0.0,
        lr_mul: float = 1.0,
    ) -> None:
        super().__init__()
        resolve(act, None)  # refuses what is none
        check_positive(in_features=in_features)
        self.act, self.lr_mul, self.scale = act, lr_mul, lr_mul / in_features**0.5
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_mul)
        self.bias = nn.Parameter(torch.full((out_features,), float(bias_init)))

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias if self.lr_mul == 1 else self.bias * self.lr_mul
        x = x * self.scale  # has fewer elements than the weight
        if self.act == "linear":
            return ops.linear(x, self.weight, bias)
        y = ops.linear(x, self.weight)
        return ops.bias_act(y, bias.to(y.dtype), -1, self.act)

    def extra_repr(self) -> str:
        out_features, in_features = self.weight.shape
        return f"{in_features}, {out_features}, act={self.act}, lr_mul={self.lr_mul}"


class EqualizedConv2d(nn.Module):
    """`ops.conv2d_resample` with weight / sqrt(in_channels * kernel_size^2), without a bias."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        check_positive(in_channels=in_channels, kernel_size=kernel_size)
        self.scale = 1 / (in_channels * kernel_size**2) ** 0.5
        shape = (out_channels, in_channels, kernel_size, kernel_size)
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(
        self, x: Tensor, filter: Tensor | None = None, *, down: int = 1, gain: float = 1.0
    ) -> Tensor:
        weight = (self.weight * (self.scale * gain)).to(x.dtype)
        return ops.conv2d_resample(x, weight, filter, down=down)

    def extra_repr(self) -> str:
        out_channels, in_channels, kernel_size, _ = self.weight.shape
        return f"{in_channels}, {out_channels}, kernel_size={kernel_size}"
