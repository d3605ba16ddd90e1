"""The blocks of StyleGAN2, under the names that rosinality's checkpoints give their weights."""

from math import sqrt
from typing import TypeVar

import torch
from torch import Tensor, nn

from aigc_fast import ops
from aigc_fast.nn import BiasAct, Blur, EqualizedConv2d, ModulatedConv2d, Upsample2d

Layer = TypeVar("Layer", bound=nn.Module)


def channels_at(resolution: int, multiplier: float, most: int) -> int:
    """Feature maps at a resolution: half as many for twice the pixels, up to `most`."""
    return min(most, int(16384 * multiplier / resolution))


def resolutions_up_to(resolution: int) -> list[int]:
    """8, 16, ... resolution."""
    if resolution not in (8, 16, 32, 64, 128, 256, 512, 1024, 2048):
        raise ValueError(f"resolution must be a power of 2 from 8 to 2048, got {resolution}")
    return [2**i for i in range(3, resolution.bit_length())]


def pixel_norm(x: Tensor) -> Tensor:
    """Vectors of a mean square of 1."""
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-8)


def one_hot(labels: Tensor | None, num_classes: int, like: Tensor) -> Tensor:
    """Labels (batch,) as rows of zeros and a one, in the dtype of `like`."""
    if labels is None or labels.shape != like.shape[:1] or labels.is_floating_point():
        found = None if labels is None else (labels.dtype, tuple(labels.shape))
        raise ValueError(f"labels must be {len(like)} whole numbers, got {found}")
    return nn.functional.one_hot(labels.long(), num_classes).to(like.dtype)


class StyledConv(nn.Module):
    """A modulated 3 x 3 convolution; noise, bias, leaky ReLU and clamp are its epilogue."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        style_dim: int,
        *,
        up: int = 1,
        clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.conv = ModulatedConv2d(in_channels, out_channels, 3, style_dim, up=up)
        self.noise = nn.ParameterDict({"weight": torch.zeros(1)})
        self.activate = BiasAct(out_channels, act="lrelu", clamp=clamp)

    def forward(self, x: Tensor, style: Tensor, noise: Tensor | None) -> Tensor:
        strength = None if noise is None else self.noise["weight"]
        bias, clamp = self.activate.bias, self.activate.clamp
        return self.conv(x, style, noise, strength, bias, act="lrelu", clamp=clamp)


class ToRGB(nn.Module):
    """The image of a resolution: a modulated 1 x 1 convolution, added to the image before it."""

    def __init__(self, in_channels: int, style_dim: int, image_channels: int, up: int = 2) -> None:
        super().__init__()
        self.conv = ModulatedConv2d(in_channels, image_channels, 1, style_dim, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(1, image_channels, 1, 1))
        self.upsample = Upsample2d(factor=up) if up > 1 else None

    def forward(self, x: Tensor, style: Tensor, image: Tensor | None) -> Tensor:
        y = self.conv(x, style, None, None, self.bias.flatten())
        return y if image is None or self.upsample is None else y + self.upsample(image)


class ConvLayer(nn.Sequential):
    """[Blur,] convolution [, bias and leaky ReLU]: with a blur it halves the resolution."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        down: bool = False,
        activate: bool = True,
        clamp: float | None = None,
    ) -> None:
        layers: list[nn.Module] = [Blur()] if down else []
        layers.append(EqualizedConv2d(in_channels, out_channels, kernel_size))
        if activate:
            layers.append(BiasAct(out_channels, act="lrelu", clamp=clamp))
        super().__init__(*layers)

    def _first(self, kind: type[Layer]) -> Layer | None:
        return next((layer for layer in self if isinstance(layer, kind)), None)

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        """gain: factor on the result, at no cost; the clamp grows with it."""
        blur, end = self._first(Blur), self._first(BiasAct)
        conv = self[int(blur is not None)]
        filter, down = (None, 1) if blur is None else (blur.kernel, 2)
        if end is None:
            return conv(x, filter, down=down, gain=gain)
        y = conv(x, filter, down=down)
        clamp = None if end.clamp is None else end.clamp * gain
        return ops.bias_act(y, end.bias.to(y.dtype), 1, "lrelu", gain=sqrt(2) * gain, clamp=clamp)


class ResBlock(nn.Module):
    """Half the resolution: (conv2(conv1(x)) + skip(x)) / sqrt(2)."""

    def __init__(self, in_channels: int, out_channels: int, clamp: float | None = None) -> None:
        super().__init__()
        self.conv1 = ConvLayer(in_channels, in_channels, 3, clamp=clamp)
        self.conv2 = ConvLayer(in_channels, out_channels, 3, down=True, clamp=clamp)
        self.skip = ConvLayer(in_channels, out_channels, 1, down=True, activate=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x), sqrt(0.5)) + self.skip(x, sqrt(0.5))
