"""HiFi-GAN's generator: from mel spectrograms, or the latents of VITS, to waveforms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from aigc_fast.nn._conv1d import convolve

from .blocks import SLOPE
from .checks import check_size
from .generator import Generator

#: before the last convolution: leaky_relu's default
LAST_SLOPE = 0.01


class HiFiGANGenerator(Generator):
    """Mel spectrograms or latents (batch, in_channels, frames) to waveforms in [-1, 1],
    (batch, 1, frames * hop).

    upsample_rates:           samples that each transposed convolution makes of one; their product
                              is `hop`.
    upsample_kernel_sizes:    of these convolutions: the rate plus an even number, or 0.
    upsample_initial_channel: channels before the first of them; each one halves the channels.
    resblock_kernel_sizes, resblock_dilation_sizes: of the parallel residual blocks after each of
                              them, whose mean is taken; kernel sizes are odd.
    resblock:                 "1" for blocks of pairs of convolutions, "2" for single ones.
    in_channels:              mel bands, or the channels of VITS's latents.
    speaker_channels:         size of a speaker's vector, 0 for none (VITS: `cond`).
    bias:                     whether the last convolution has one; in VITS it has not.

    Names of the state dict are the original's. Attribute: `hop`, samples of a frame. ValueError
    names an argument that will not do. Differentiable.

    Source: Kong et al. 2020, arXiv:2010.05646.

    >>> HiFiGANGenerator((8, 8, 2, 2), (16, 16, 4, 4), 128)  # V2
    """

    _slope = SLOPE

    def __init__(
        self,
        upsample_rates: Sequence[int],
        upsample_kernel_sizes: Sequence[int],
        upsample_initial_channel: int,
        resblock_kernel_sizes: Sequence[int] = (3, 7, 11),
        resblock_dilation_sizes: Sequence[Sequence[int]] = ((1, 3, 5),) * 3,
        resblock: str = "1",
        *,
        in_channels: int = 80,
        speaker_channels: int = 0,
        bias: bool = True,
    ) -> None:
        super().__init__(
            upsample_rates, upsample_kernel_sizes, upsample_initial_channel,
            resblock_kernel_sizes, resblock_dilation_sizes, resblock, in_channels, bias,
        )  # fmt: skip
        check_size("speaker_channels", speaker_channels, at_least=0)
        channels = upsample_initial_channel
        self.cond = nn.Conv1d(speaker_channels, channels, 1) if speaker_channels else None

    def forward(self, x: Tensor, speaker: Tensor | None = None) -> Tensor:
        """x: (batch, in_channels, frames); speaker: (batch, speaker_channels, 1), or None."""
        if (speaker is None) != (self.cond is None):
            raise ValueError("speaker must be given if, and only if, there are speaker_channels")
        x = convolve(x, self.conv_pre)
        if speaker is not None and self.cond is not None:
            x = x + convolve(speaker, self.cond)
        return self._upsampled(x)

    def _waveform(self, x: Tensor) -> Tensor:
        return torch.tanh(convolve(x, self.conv_post, LAST_SLOPE))
