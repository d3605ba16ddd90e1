"""HiFi-GAN's discriminators, which listen to a waveform folded by periods and at coarser scales."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from aigc_fast.nn import spectral_norm

from .blocks import SLOPE
from .checkpoint import read_torch
from .checks import check_size
from .weight_norm import weight_norm

PERIODS = (2, 3, 5, 7, 11)
_SCALES = 3


class SubDiscriminator(nn.Module):
    """Convolutions with a leaky ReLU after each, and one to a single channel."""

    def __init__(self, convs: Sequence[nn.Module], conv_post: nn.Module) -> None:
        super().__init__()
        self.convs, self.conv_post = nn.ModuleList(convs), conv_post

    def forward(self, x: Tensor) -> list[Tensor]:
        """What each convolution gives, the last of it the logits."""
        features = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), SLOPE)
            features.append(x)
        return [*features, self.conv_post(x)]


class PeriodDiscriminator(SubDiscriminator):
    """One that sees samples a period apart as neighbours."""

    def __init__(self, period: int, channels: int) -> None:
        widths = [1, *(channels * times for times in (1, 4, 16, 32, 32))]
        # torch's own convolutions: as one along time, fused or not, they are no faster on a CPU.
        convs = [
            nn.Conv2d(i, o, (5, 1), (stride, 1), (2, 0))
            for i, o, stride in zip(widths, widths[1:], (3, 3, 3, 3, 1), strict=False)
        ]
        super().__init__(convs, nn.Conv2d(widths[-1], 1, (3, 1), padding=(1, 0)))
        self.period = period

    def forward(self, x: Tensor) -> list[Tensor]:
        if x.shape[2] % self.period:
            x = F.pad(x, (0, -x.shape[2] % self.period), "reflect")
        return super().forward(x.unflatten(2, (-1, self.period)))


class ScaleDiscriminator(SubDiscriminator):
    """One that sees a waveform through ever longer windows."""

    def __init__(self, channels: int) -> None:
        widths = [1, *(channels * times for times in (1, 1, 2, 4, 8, 8, 8))]
        kernels, strides, groups = (15, *[41] * 5, 5), (1, 2, 2, 4, 4, 1, 1), (1, 4, *[16] * 4, 1)
        convs = [
            nn.Conv1d(i, o, kernel, stride, kernel // 2, groups=g)
            for i, o, kernel, stride, g in zip(
                widths, widths[1:], kernels, strides, groups, strict=False
            )
        ]
        super().__init__(convs, nn.Conv1d(widths[-1], 1, 3, padding=1))


class MultiPeriodDiscriminator(nn.Module):
    """A discriminator for each of the periods, with weight norm."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.discriminators = nn.ModuleList(PeriodDiscriminator(p, channels) for p in PERIODS)
        weight_norm(self)

    def forward(self, x: Tensor) -> list[list[Tensor]]:
        return [discriminator(x) for discriminator in self.discriminators]


class MultiScaleDiscriminator(nn.Module):
    """Discriminators of the waveform, with spectral norm, and of means of it that have a half and
    a quarter of its samples, with weight norm."""

    def __init__(self, channels: int = 128) -> None:
        super().__init__()
        first, *others = (ScaleDiscriminator(channels) for _ in range(_SCALES))
        self.discriminators = nn.ModuleList([spectral_norm(first), *map(weight_norm, others)])

    def forward(self, x: Tensor) -> list[list[Tensor]]:
        found = []
        for discriminator in self.discriminators:
            found.append(discriminator(x))
            x = F.avg_pool1d(x, 4, 2, padding=2)
        return found


class VocoderDiscriminator(nn.Module):
    """Both kinds together: waveforms (batch, 1, samples) to features and logits.

    channels: of the first convolutions of periods; four times as many of scales. A multiple of 4;
              32 in the paper, 70 million parameters in all.

    `forward` gives for each of the 8 discriminators what each of its convolutions gives, the logits
    last. The state dict is that of the published file: "mpd" and "msd", then its names.

    Source: Kong et al. 2020, arXiv:2010.05646.
    """

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        if check_size("channels", channels) % 4:
            raise ValueError(f"channels must be a multiple of 4, got {channels}")
        self.mpd = MultiPeriodDiscriminator(channels)
        self.msd = MultiScaleDiscriminator(4 * channels)

    def forward(self, x: Tensor) -> list[list[Tensor]]:
        return [*self.mpd(x), *self.msd(x)]

    def load_published(self, path: str | os.PathLike[str]) -> None:
        """Takes the weights of a `do_*` file of HiFi-GAN's authors, of which nothing but tensors is
        read; its optimizers' are left.

        OSError where it cannot be opened, ValueError where it is unsound or does not fit.
        """
        state = read_torch(path)
        try:
            for name in ("mpd", "msd"):
                getattr(self, name).load_state_dict(state[name])
        except (KeyError, TypeError, RuntimeError, AttributeError) as error:
            raise ValueError(f"{path}: not the discriminators of HiFi-GAN: {error}") from None
