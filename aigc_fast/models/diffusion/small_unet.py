"""A small U-Net for small images.

Not a configuration of `UNet`: it folds pixels into channels, pools, and joins one skip a block,
where diffusers' convolves at full size, strides and joins a skip more a level: seven times the
arithmetic on 28x28 digits (551 MFLOP a sample against 77, with the same three levels). A merge
would leave that behind, or give `UNet` options that no checkpoint has.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aigc_fast import ops
from aigc_fast.nn import Conv2d, GroupNormAct, Linear, ModulatedGroupNormAct

from ..inputs import check_input, timesteps_of


class ResBlock(nn.Module):
    """x + conv(silu((1 + scale) * norm(conv(silu(norm(x)))) + shift)), the embedding giving scale
    and shift of each channel."""

    def __init__(self, in_channels: int, out_channels: int, embedding_dim: int) -> None:
        super().__init__()
        self.norm1 = GroupNormAct(8, in_channels, act="silu")
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.modulation = Linear(embedding_dim, 2 * out_channels)
        self.norm2 = ModulatedGroupNormAct(8, out_channels, act="silu")
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)  # every block starts as the identity
        self.skip = (
            nn.Identity() if in_channels == out_channels else Conv2d(in_channels, out_channels, 1)
        )

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding).chunk(2, dim=1)
        h = self.norm2(self.conv1(self.norm1(x)), scale, shift)
        return self.skip(x) + self.conv2(h)


class SmallUNet(nn.Module):
    """Predicts from noisy images, timesteps and, where there are classes, labels.

    The image is folded by `patch` (space to depth) on the way in and unfolded on the way out;
    every level after the first halves it. Each block on the way up reads the output of its
    counterpart on the way down.

    channels: width of each level, a multiple of 8.
    blocks: residual blocks of each level, each way.
    num_classes: labels go from 0 to num_classes, which stands for "any"; 0 for no other class.
    """

    def __init__(
        self,
        image_channels: int = 1,
        channels: Sequence[int] = (32, 64, 128),
        blocks: int = 1,
        patch: int = 2,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        self.image_channels, self.patch, self.blocks = image_channels, patch, blocks
        self.num_classes = num_classes
        self.time_features, dim = channels[0], 4 * channels[0]
        self.time = nn.Sequential(Linear(channels[0], dim), nn.SiLU(), Linear(dim, dim))
        self.label = nn.Embedding(num_classes + 1, dim)
        width = channels[0]
        self.conv_in = Conv2d(image_channels * patch**2, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for out in channels:
            for _ in range(blocks):
                self.down.append(ResBlock(width, out, dim))
                width = out
        self.middle = ResBlock(width, width, dim)
        for out in reversed(channels):
            for _ in range(blocks):
                self.up.append(ResBlock(width + out, out, dim))
                width = out
        self.norm_out = GroupNormAct(8, width, act="silu")
        self.conv_out = Conv2d(width, image_channels * patch**2, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)

    def forward(
        self, sample: Tensor, timesteps: Tensor | float, labels: Tensor | None = None
    ) -> Tensor:
        """sample (batch, image_channels, height, width), timesteps (batch,) or a number for all of
        them, to a prediction of the shape of sample.

        height and width: multiples of patch.
        labels: int64 (batch,), or None for "any" throughout.
        """
        check_input("sample", sample, self.image_channels, "height", "width")
        if sample.shape[2] % self.patch or sample.shape[3] % self.patch:
            raise ValueError(
                f"sample must have height and width that are multiples of {self.patch}, got "
                f"{tuple(sample.shape)}"
            )
        timesteps = timesteps_of(timesteps, sample)
        if labels is None:
            labels = torch.full_like(timesteps, self.num_classes, dtype=torch.int64)
        time = ops.timestep_embedding(
            timesteps, self.time_features, flip_sin_to_cos=True, downscale_freq_shift=0.0
        ).to(sample.dtype)
        embedding = F.silu(self.time(time) + self.label(labels))

        h = self.conv_in(F.pixel_unshuffle(sample, self.patch))
        skips = []
        for i, block in enumerate(self.down):
            if i > 0 and i % self.blocks == 0:
                h = F.avg_pool2d(h, 2, ceil_mode=True)
            h = block(h, embedding)
            skips.append(h)
        h = self.middle(h, embedding)
        for i, block in enumerate(self.up):
            if i > 0 and i % self.blocks == 0:
                h = F.interpolate(h, size=skips[-1].shape[2:])
            h = block(torch.cat([h, skips.pop()], dim=1), embedding)
        return F.pixel_shuffle(self.conv_out(self.norm_out(h)), self.patch)
