"""A residual GAN without norms, as R3GAN (Huang et al. 2024, arXiv:2501.05441), config E.

Nothing in it mixes samples and everything is smooth or piecewise linear, so that the gradients of
its penalties (R1 and R2, with the relativistic loss: the recipe "r3gan") are cheap and exact.
"""

from itertools import pairwise
from math import gcd

import torch
from torch import Tensor, nn

from aigc_fast.nn import Conv2dBiasAct, Downsample2d, Linear, Upsample2d

from ..inputs import check_input
from ..labels import check_labels
from .layers import LEAKY

#: inner channels of a block, as a multiple of its own, and how many of them convolve together
_EXPANSION, _GROUP = 2, 16


class ResidualBlock(nn.Module):
    """x + conv3(lrelu(conv2(lrelu(conv1(x))))): 1 x 1 to twice the channels, 3 x 3 in groups of 16
    channels (fewer where 16 does not divide them), 1 x 1 back.

    depth: blocks of the whole network. The first two convolutions start smaller by depth^(-1/4),
           the last one at zero: at any depth the network starts as if it had no blocks (Fixup,
           Zhang et al. 2019, arXiv:1901.09321).
    """

    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        inner = _EXPANSION * channels
        groups = inner // gcd(inner, _GROUP)
        self.conv1 = Conv2dBiasAct(channels, inner, 1, **LEAKY)
        self.conv2 = Conv2dBiasAct(inner, inner, 3, padding=1, groups=groups, **LEAKY)
        self.conv3 = nn.Conv2d(inner, channels, 1, bias=False)
        for conv in (self.conv1, self.conv2):
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)
            nn.init.kaiming_normal_(conv.weight, LEAKY["alpha"])
            with torch.no_grad():
                conv.weight *= depth**-0.25
        nn.init.zeros_(self.conv3.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv3(self.conv2(self.conv1(x)))


class R3GANGenerator(nn.Module):
    """Latent vectors (batch, latent_dim) to images (batch, image_channels, size, size), whose range
    is learned: about [-1, 1] where the real images have that.

    size:         4, 5, 6 or 7 times a power of 2, as 28, 32, 64, 128 or 256.
    channels:     of the stage of full size; each stage before it has half the size and twice as
                  many, up to max_channels.
    num_classes:  a conditional generator: called with labels, int64 (batch,), whose learned vectors
                  join the latent ones. None for one without labels.
    blocks:       residual blocks of a stage.
    """

    def __init__(
        self,
        size: int = 64,
        image_channels: int = 3,
        channels: int = 64,
        latent_dim: int = 100,
        num_classes: int | None = None,
        *,
        max_channels: int = 768,
        blocks: int = 2,
    ) -> None:
        super().__init__()
        first, widths = _stages(size, channels, max_channels)
        self.latent_dim, depth = latent_dim, blocks * len(widths)
        self.embed = None if num_classes is None else nn.Embedding(num_classes, latent_dim)
        given = latent_dim if num_classes is None else 2 * latent_dim
        self.linear = _plain(Linear(given, widths[0], bias=False))
        self.basis = nn.Parameter(torch.randn(widths[0], first, first))
        layers: list[nn.Module] = [ResidualBlock(widths[0], depth) for _ in range(blocks)]
        for before, width in pairwise(widths):
            layers += [*_convolution(before, width), Upsample2d()]
            layers += [ResidualBlock(width, depth) for _ in range(blocks)]
        layers.append(_plain(nn.Conv2d(channels, image_channels, 1, bias=False)))
        self.main = nn.Sequential(*layers)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        check_input("latents", latents, self.latent_dim)
        check_labels(labels, self.embed is not None)
        if self.embed is not None:
            latents = torch.cat([latents, self.embed(labels).to(latents.dtype)], 1)
        scale = self.linear(latents)[:, :, None, None]
        return self.main(scale * self.basis.to(scale.dtype))


class R3GANDiscriminator(nn.Module):
    """Images (batch, image_channels, size, size) to logits (batch, 1): above zero means real.

    size, channels, max_channels, blocks: as of the generator, whose stages it has in reverse.
    num_classes: a conditional discriminator: the logit is the inner product of the features and a
                 learned vector of the class (Miyato & Koyama 2018, arXiv:1802.05637).
    """

    def __init__(
        self,
        size: int = 64,
        image_channels: int = 3,
        channels: int = 64,
        num_classes: int | None = None,
        *,
        max_channels: int = 768,
        blocks: int = 2,
    ) -> None:
        super().__init__()
        self.image_shape = image_channels, size, size
        last, widths = _stages(size, channels, max_channels)
        depth, features = blocks * len(widths), widths[0]
        layers: list[nn.Module] = [_plain(nn.Conv2d(image_channels, channels, 1, bias=False))]
        for before, width in pairwise(widths[::-1]):
            layers += [ResidualBlock(before, depth) for _ in range(blocks)]
            layers += [Downsample2d(), *_convolution(before, width)]
        layers += [ResidualBlock(features, depth) for _ in range(blocks)]
        self.main = nn.Sequential(*layers)
        self.basis = nn.Parameter(torch.randn(features, last, last) / last)
        dim = 1 if num_classes is None else features
        self.linear = _plain(Linear(features, dim, bias=False))
        self.embed = None if num_classes is None else nn.Embedding(num_classes, dim)
        if self.embed is not None:
            nn.init.normal_(self.embed.weight, 0.0, dim**-0.5)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        check_input("images", images, *self.image_shape)
        check_labels(labels, self.embed is not None)
        x = self.main(images)
        logits = self.linear((x * self.basis.to(x.dtype)).sum((2, 3)))
        if self.embed is None:
            return logits
        return (logits * self.embed(labels).to(logits.dtype)).sum(1, keepdim=True)


def _stages(size: int, channels: int, max_channels: int) -> tuple[int, list[int]]:
    """The smallest stage's pixels, 4 to 7, and the channels of all from there to full size."""
    doublings = max(size // 4, 1).bit_length() - 1
    first = size >> doublings
    if first << doublings != size or first < 4:
        raise ValueError(f"size must be 4, 5, 6 or 7 times a power of 2, got {size}")
    return first, [min(channels << i, max_channels) for i in range(doublings, -1, -1)]


def _convolution(before: int, width: int) -> list[nn.Module]:
    """From one number of channels to another, where it is another."""
    return [] if before == width else [_plain(nn.Conv2d(before, width, 1, bias=False))]


def _plain(layer: nn.Linear | nn.Conv2d) -> nn.Module:
    """A layer with no activation after it: its weights keep the variance."""
    nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
    return layer
