"""What judges vocoders: waveforms folded by periods, at coarser scales, and as spectrograms."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aigc_fast.nn import spectral_norm
from aigc_fast.ops._checks import check_choice

from .blocks import SLOPE
from .checkpoint import read_torch
from .checks import check_size
from .mel import parts_of_frames
from .weight_norm import weight_norm

PERIODS = (2, 3, 5, 7, 11)
_SCALES = 3
#: samples of a transform, from one to the next, and of a window
RESOLUTIONS = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))


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


class ResolutionDiscriminator(SubDiscriminator):
    """One that sees the magnitudes of a spectrogram."""

    window: Tensor

    def __init__(self, n_fft: int, hop_size: int, win_size: int, channels: int) -> None:
        convs = [
            nn.Conv2d(i, channels, (3, width), (1, stride), (1, width // 2))
            for i, width, stride in zip(
                (1, *[channels] * 4), (9, 9, 9, 9, 3), (1, 2, 2, 2, 1), strict=True
            )
        ]
        super().__init__(convs, nn.Conv2d(channels, 1, 3, padding=1))
        self.n_fft, self.hop_size = n_fft, hop_size
        self.register_buffer("window", torch.ones(win_size), persistent=False)

    def forward(self, x: Tensor) -> list[Tensor]:
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 is too coarse for transforms
            magnitudes = parts_of_frames(x, self.n_fft, self.hop_size, self.window).norm(dim=-1)
        return super().forward(magnitudes[:, None].to(x.dtype))


class MultiResolutionDiscriminator(nn.Module):
    """A discriminator for each of the resolutions, with weight norm."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.discriminators = nn.ModuleList(
            ResolutionDiscriminator(*resolution, channels) for resolution in RESOLUTIONS
        )
        weight_norm(self)

    def forward(self, x: Tensor) -> list[list[Tensor]]:
        return [discriminator(x) for discriminator in self.discriminators]


class VocoderDiscriminator(nn.Module):
    """Two kinds together: waveforms (batch, 1, samples) to features and logits.

    channels: of the first convolutions of periods and of spectrograms; of scales four times as
              many. A multiple of 4; 32 in the papers, 70 million parameters with scales.
    kind:     "hifigan" for periods and scales, "bigvgan" for periods and spectrograms.

    `forward` gives for each discriminator what each of its convolutions gives, the logits last. The
    state dict is that of the published file: "mpd" and "msd" or "mrd", then its names.

    Sources: Kong et al. 2020, arXiv:2010.05646; Lee et al. 2023, arXiv:2206.04658.
    """

    def __init__(self, channels: int = 32, kind: str = "hifigan") -> None:
        super().__init__()
        check_choice("kind", kind, ("hifigan", "bigvgan"))
        if check_size("channels", channels) % 4:
            raise ValueError(f"channels must be a multiple of 4, got {channels}")
        self.mpd = MultiPeriodDiscriminator(channels)
        if kind == "hifigan":
            self.msd = MultiScaleDiscriminator(4 * channels)
        else:
            self.mrd = MultiResolutionDiscriminator(channels)

    def forward(self, x: Tensor) -> list[list[Tensor]]:
        return [features for part in self.children() for features in part(x)]

    def load_published(self, path: str | os.PathLike[str]) -> None:
        """Takes the weights of a `do_*` file of HiFi-GAN's or BigVGAN's authors, of which nothing
        but tensors is read; its optimizers' are left.

        OSError where it cannot be opened, ValueError where it is unsound or does not fit.
        """
        state = read_torch(path)
        try:
            for name, part in self.named_children():
                part.load_state_dict(state[name])
        except (KeyError, TypeError, RuntimeError, AttributeError) as error:
            raise ValueError(f"{path}: not such discriminators: {error}") from None
