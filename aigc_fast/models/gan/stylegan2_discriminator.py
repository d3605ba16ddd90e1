"""The discriminator of StyleGAN2 (Karras et al. 2020, arXiv:1912.04958), residual."""

from torch import Tensor, nn

from aigc_fast.models.gan.stylegan2_layers import (
    ConvLayer,
    ResBlock,
    channels_at,
    one_hot,
    pixel_norm,
    resolutions_up_to,
)
from aigc_fast.models.inputs import check_input
from aigc_fast.nn import EqualizedLinear, MinibatchStddev


class StyleGAN2Discriminator(nn.Module):
    """Images (batch, image_channels, resolution, resolution) to logits (batch, 1): above zero
    means real.

    resolution, channel_multiplier, max_channels, image_channels, num_classes, clamp: as for
    `StyleGAN2Generator`. A conditional model projects its features on an embedding of the label.

    State dict: the names of rosinality's `d`.
    """

    def __init__(
        self,
        resolution: int,
        *,
        channel_multiplier: float = 2,
        max_channels: int = 512,
        image_channels: int = 3,
        num_classes: int = 0,
        clamp: float | None = None,
    ) -> None:
        super().__init__()
        sizes = resolutions_up_to(resolution)
        self.resolution, self.image_channels = resolution, image_channels
        self.num_classes = num_classes
        c = channels_at(resolution, channel_multiplier, max_channels)
        layers: list[nn.Module] = [ConvLayer(image_channels, c, 1, clamp=clamp)]
        for size in reversed(sizes):
            before, c = c, channels_at(size // 2, channel_multiplier, max_channels)
            layers.append(ResBlock(before, c, clamp))
        self.convs = nn.Sequential(*layers)
        self.stddev = MinibatchStddev()
        self.final_conv = ConvLayer(c + 1, c, 3, clamp=clamp)
        self.final_linear = nn.Sequential(
            EqualizedLinear(c * 4 * 4, c, "lrelu"),
            EqualizedLinear(c, c if num_classes else 1),
        )
        self.embed = EqualizedLinear(num_classes, c) if num_classes else None

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        check_input("images", images, self.image_channels, self.resolution, self.resolution)
        x = self.final_conv(self.stddev(self.convs(images)))
        y = self.final_linear(x.flatten(1))
        if self.embed is not None:
            given = pixel_norm(self.embed(one_hot(labels, self.num_classes, y)))
            return (y * given).sum(1, keepdim=True) / given.shape[1] ** 0.5
        if labels is not None:
            raise ValueError("labels must be None: the model has no classes")
        return y
