"""A compact convolutional VAE whose latent is a vector."""

import torch
from torch import Tensor, nn

from aigc_fast.nn import Conv2d, Conv2dBiasAct, ConvTranspose2d, GroupNormAct, Linear

from ..inputs import check_input
from ..labels import join_labels

_GROUP = 8  # channels that are normalised together


class ConvVAE(nn.Module):
    """Square images to the parameters of a Gaussian over latent vectors, and latents to images.

    Every layer of the encoder halves the image, until a side has at most four pixels, and has
    twice the channels of the one before it, up to four times the first; the decoder is its mirror.

    size:           pixels of a side, at least 5; odd ones are rounded up on the way down.
    image_channels: 1 for grey, 3 for RGB.
    channels:       of the first layer, a multiple of 8.
    latent_dim:     numbers of a latent vector.
    num_classes:    a conditional model: labels, int64 (batch,), join what goes into both halves as
                    one number a class. None for one without labels.

    Source: Kingma & Welling 2014, arXiv:1312.6114; with labels Sohn et al. 2015.
    """

    def __init__(
        self,
        size: int = 28,
        image_channels: int = 1,
        channels: int = 32,
        latent_dim: int = 16,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        if size < 5:
            raise ValueError(f"size must be at least 5, got {size}")
        if channels < _GROUP or channels % _GROUP:
            raise ValueError(f"channels must be a multiple of {_GROUP}, got {channels}")
        self.size, self.image_channels = size, image_channels
        self.latent_dim, self.num_classes = latent_dim, num_classes
        sides = [size]
        while sides[-1] > 4:
            sides.append((sides[-1] + 1) // 2)
        widths = [image_channels, *(channels * min(1 << i, 4) for i in range(len(sides) - 1))]
        # A kernel of 4 takes an even side to its half and back, one of 3 an odd one.
        kernels = [4 - side % 2 for side in sides[:-1]]
        down: list[nn.Module] = []
        up: list[nn.Module] = []
        for kernel, before, after in zip(kernels, widths[:-1], widths[1:], strict=True):
            if not down:  # a norm would hide how bright the image is
                down = [Conv2dBiasAct(before, after, kernel, 2, 1, act="swish", gain=1.0)]
                up = [ConvTranspose2d(after, before, kernel, 2, 1)]
            else:
                down += [Conv2d(before, after, kernel, 2, 1, bias=False), _norm(after)]
                up.insert(0, ConvTranspose2d(after, before, kernel, 2, 1, bias=False))
            up.insert(0, _norm(after))
        self.down, self.up = nn.Sequential(*down), nn.Sequential(*up)
        self.inner_shape = (widths[-1], sides[-1], sides[-1])
        features, classes = widths[-1] * sides[-1] ** 2, num_classes or 0
        self.to_latent = Linear(features + classes, 2 * latent_dim)
        self.from_latent = Linear(latent_dim + classes, features)

    def encode(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images (batch, image_channels, size, size) to (batch, 2 * latent_dim): means, then
        log-variances, as `ops.sample_gaussian` takes them."""
        check_input("images", images, self.image_channels, self.size, self.size)
        features = self.down(images).flatten(1)
        return self.to_latent(join_labels(features, labels, self.num_classes))

    def decode(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Latents (batch, latent_dim) to (batch, image_channels, size, size): what those numbers
        are, logits or pixels, is the likelihood's to say."""
        check_input("latents", latents, self.latent_dim)
        features = self.from_latent(join_labels(latents, labels, self.num_classes))
        return self.up(features.view(-1, *self.inner_shape))

    def sample(
        self,
        count: int,
        labels: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """`decode` of so many draws from the standard normal; labels: (count,) where there are
        classes; generator: on the model's device."""
        latents = self.from_latent.weight.new_empty(count, self.latent_dim)
        return self.decode(latents.normal_(generator=generator), labels)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """The images again: `decode` of the means of their latents."""
        mean, _ = self.encode(images, labels).chunk(2, 1)
        return self.decode(mean, labels)


def _norm(channels: int) -> nn.Module:
    return GroupNormAct(channels // _GROUP, channels, act="silu")
