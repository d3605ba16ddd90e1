"""ESRGAN's generator: residual-in-residual dense blocks."""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..inputs import check_input
from .convolution import convolve


def _conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


def _leaky(conv: nn.Conv2d, x: Tensor | list[Tensor]) -> Tensor:
    slope = conv.weight.new_full((conv.out_channels,), 0.2)
    return convolve(x, conv, slope)


class ResidualDenseBlock(nn.Module):
    """x + 0.2 f(x): five convolutions, each of which reads what all before it wrote."""

    def __init__(self, num_feat: int = 64, num_grow_ch: int = 32) -> None:
        super().__init__()
        self.conv1 = _conv(num_feat, num_grow_ch)
        self.conv2 = _conv(num_feat + num_grow_ch, num_grow_ch)
        self.conv3 = _conv(num_feat + 2 * num_grow_ch, num_grow_ch)
        self.conv4 = _conv(num_feat + 3 * num_grow_ch, num_grow_ch)
        self.conv5 = _conv(num_feat + 4 * num_grow_ch, num_feat)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            features.append(_leaky(conv, features))
        return convolve(features, self.conv5, residual=x, gain=0.2)


class RRDB(nn.Module):
    """x + 0.2 f(x), f being three dense blocks."""

    def __init__(self, num_feat: int, num_grow_ch: int = 32) -> None:
        super().__init__()
        self.rdb1 = ResidualDenseBlock(num_feat, num_grow_ch)
        self.rdb2 = ResidualDenseBlock(num_feat, num_grow_ch)
        self.rdb3 = ResidualDenseBlock(num_feat, num_grow_ch)

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.rdb3(self.rdb2(self.rdb1(x))), alpha=0.2)


class RRDBNet(nn.Module):
    """Images (batch, num_in_ch, height, width) in [0, 1] to `scale` times their height and width.

    scale: 4, or 2 or 1, for which the image is first folded into 4 or 16 times the channels; its
           height and width must then be multiples of 2 or 4.

    Names of the state dict and arguments are Real-ESRGAN's.

    Source: Wang et al. 2018, arXiv:1809.00219, and the code of Real-ESRGAN (arXiv:2107.10833).
    """

    def __init__(
        self,
        num_in_ch: int = 3,
        num_out_ch: int = 3,
        scale: int = 4,
        num_feat: int = 64,
        num_block: int = 23,
        num_grow_ch: int = 32,
    ) -> None:
        super().__init__()
        if scale not in (1, 2, 4):
            raise ValueError(f"scale must be 1, 2 or 4, got {scale}")
        self.num_in_ch, self.scale, self.fold = num_in_ch, scale, 4 // scale
        self.conv_first = _conv(num_in_ch * self.fold**2, num_feat)
        self.body = nn.Sequential(*[RRDB(num_feat, num_grow_ch) for _ in range(num_block)])
        self.conv_body = _conv(num_feat, num_feat)
        self.conv_up1 = _conv(num_feat, num_feat)
        self.conv_up2 = _conv(num_feat, num_feat)
        self.conv_hr = _conv(num_feat, num_feat)
        self.conv_last = _conv(num_feat, num_out_ch)

    @property
    def reach(self) -> int:
        """How many pixels away an input pixel can change a result; by far most of it is near."""
        return (15 * len(self.body) + 4) * self.fold

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> RRDBNet:
        """Reads ncnn's files, .param and .bin; errors as for `load_generator`."""
        from .load_ncnn import read_generator

        return read_generator(path, cls)

    def forward(self, x: Tensor) -> Tensor:
        check_input("x", x, self.num_in_ch, "height", "width")
        if x.shape[2] % self.fold or x.shape[3] % self.fold:
            raise ValueError(
                f"x must have height and width that are multiples of {self.fold}, got "
                f"{tuple(x.shape)}"
            )
        y = F.pixel_unshuffle(x, self.fold)
        y = convolve(y, self.conv_first)
        y = convolve(self.body(y), self.conv_body, residual=y)
        for conv in (self.conv_up1, self.conv_up2):
            y = _leaky(conv, F.interpolate(y, scale_factor=2, mode="nearest"))
        y = _leaky(self.conv_hr, y)
        return convolve(y, self.conv_last)
