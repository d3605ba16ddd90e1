"""HiFi-GAN's generator: from mel spectrograms, or the latents of VITS, to waveforms."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from aigc_fast.io.hf_folder import read_json
from aigc_fast.models.state import assign_state, fetch_from

from .checkpoint import read_state
from .checks import check_blocks, check_rates, check_size
from .convolution import convolve, is_fused, same_conv, upsample

SLOPE = 0.1
#: before the last convolution: leaky_relu's default
LAST_SLOPE = 0.01
#: bytes of an activation that a CPU computes at a time
PART = 1 << 21


class ResBlock1(nn.Module):
    """x + conv(act(conv(act(x)))) three times, the first convolution of each pair dilated."""

    def __init__(self, channels: int, kernel_size: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(same_conv(channels, kernel_size, d) for d in dilations)
        self.convs2 = nn.ModuleList(same_conv(channels, kernel_size) for _ in dilations)

    @property
    def reach(self) -> int:
        """Steps to either side that a result depends on."""
        return _reach(*self.convs1, *self.convs2)

    def forward(self, x: Tensor, residuals: Sequence[Tensor] = (), gain: float = 1.0) -> Tensor:
        """gain * (block(x) + sum(residuals))."""
        last = len(self.convs1) - 1
        for i, (first, second) in enumerate(zip(self.convs1, self.convs2, strict=True)):
            y = convolve(x, first, SLOPE)
            x = convolve(y, second, SLOPE, *_with(x, i == last, residuals, gain))
        return x


class ResBlock2(nn.Module):
    """x + conv(act(x)) twice, dilated."""

    def __init__(self, channels: int, kernel_size: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(same_conv(channels, kernel_size, d) for d in dilations)

    @property
    def reach(self) -> int:
        """Steps to either side that a result depends on."""
        return _reach(*self.convs)

    def forward(self, x: Tensor, residuals: Sequence[Tensor] = (), gain: float = 1.0) -> Tensor:
        """gain * (block(x) + sum(residuals))."""
        last = len(self.convs) - 1
        for i, conv in enumerate(self.convs):
            x = convolve(x, conv, SLOPE, *_with(x, i == last, residuals, gain))
        return x


def _with(
    x: Tensor, last: bool, residuals: Sequence[Tensor], gain: float
) -> tuple[Sequence[Tensor], float]:
    """What is added to a convolution of a block, and its gain: others' only to the last."""
    return ((x, *residuals), gain) if last else ((x,), 1.0)


def _reach(*convs: nn.Module) -> int:
    return sum(int(cast(nn.Conv1d, conv).padding[0]) for conv in convs)


class HiFiGANGenerator(nn.Module):
    """(batch, in_channels, frames) to waveforms (batch, 1, frames * hop) in [-1, 1].

    upsample_rates:           samples that each transposed convolution makes of one; their product
                              is `hop`.
    upsample_kernel_sizes:    of these convolutions: a rate, or more than it by an even number.
    upsample_initial_channel: channels before the first of them; each halves them.
    resblock_kernel_sizes, resblock_dilation_sizes: of the residual blocks after each of them, odd
                              kernels; their mean is taken.
    resblock:                 "1" for blocks of pairs of convolutions, "2" for single ones.
    in_channels:              mel bands, or the channels of VITS's latents.
    speaker_channels:         of a speaker's vector, 0 for none (VITS: `cond`).
    bias:                     of the last convolution; VITS has none.

    Names of the state dict are the original's. Attribute: `hop`, samples of a frame. ValueError
    names an argument that will not do. Differentiable.

    Source: Kong et al. 2020, arXiv:2010.05646.

    >>> HiFiGANGenerator((8, 8, 2, 2), (16, 16, 4, 4), 128)  # V2
    """

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
        super().__init__()
        check_rates(upsample_rates, upsample_kernel_sizes)
        check_blocks(resblock, resblock_kernel_sizes, resblock_dilation_sizes)
        channels = check_size("upsample_initial_channel", upsample_initial_channel)
        check_size("in_channels", in_channels)
        check_size("speaker_channels", speaker_channels, at_least=0)
        if channels % 2 ** len(upsample_rates):
            raise ValueError(
                f"upsample_initial_channel must be divisible by 2 for each of upsample_rates "
                f"({len(upsample_rates)}), got {channels}"
            )
        self.hop = prod(upsample_rates)
        self.conv_pre = nn.Conv1d(in_channels, channels, 7, padding=3)
        self.cond = nn.Conv1d(speaker_channels, channels, 1) if speaker_channels else None
        self.ups, self.resblocks = nn.ModuleList(), nn.ModuleList()
        block = ResBlock1 if resblock == "1" else ResBlock2
        for rate, kernel in zip(upsample_rates, upsample_kernel_sizes, strict=True):
            padding = (kernel - rate) // 2
            self.ups.append(
                nn.ConvTranspose1d(channels, channels // 2, kernel, rate, padding=padding)
            )
            channels //= 2
            shapes = zip(resblock_kernel_sizes, resblock_dilation_sizes, strict=True)
            self.resblocks.extend(block(channels, size, dilations) for size, dilations in shapes)
        self.conv_post = nn.Conv1d(channels, 1, 7, padding=3, bias=bias)

    def forward(self, x: Tensor, speaker: Tensor | None = None) -> Tensor:
        """x: (batch, in_channels, frames); speaker: (batch, speaker_channels, 1), or None."""
        if (speaker is None) != (self.cond is None):
            raise ValueError("speaker must be given if, and only if, there are speaker_channels")
        x = convolve(x, self.conv_pre)
        if speaker is not None and self.cond is not None:
            x = x + convolve(speaker, self.cond)
        for i in range(len(self.ups)):
            x = self._in_parts(x, i) if is_fused(self.conv_post, x) else self._stage(x, i)
        return x

    def _stage(self, x: Tensor, i: int) -> Tensor:
        """The i-th upsampling and its blocks; with the last of them, the waveform."""
        x = upsample(x, self.ups[i], SLOPE)
        *others, last = self._blocks(i)
        x = last(x, [block(x) for block in others], 1 / (len(others) + 1))  # the blocks' mean
        if i < len(self.ups) - 1:
            return x
        return torch.tanh(convolve(x, self.conv_post, LAST_SLOPE))

    def _in_parts(self, x: Tensor, i: int) -> Tensor:
        """The same from parts of x so small that what lies between stays in the caches.

        Parts overlap by what a result can depend on, so that it is the same to the bit.
        """
        up = cast(nn.ConvTranspose1d, self.ups[i])
        (rate,), (kernel,) = up.stride, up.kernel_size
        samples = max(block.reach for block in self._blocks(i)) + self.conv_post.kernel_size[0] // 2
        overlap = -(-samples // rate) + -(-kernel // rate)
        size = max(4 * overlap, PART // (up.out_channels * rate * x.element_size()))
        parts = []
        for start in range(0, x.shape[2], size):
            first = max(0, start - overlap)
            y = self._stage(x[..., first : start + size + overlap], i)
            parts.append(y[..., (start - first) * rate :][..., : size * rate])
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def _blocks(self, i: int) -> list[ResBlock1 | ResBlock2]:
        each = len(self.resblocks) // len(self.ups)
        return [cast(ResBlock1, block) for block in self.resblocks[i * each : (i + 1) * each]]

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        config: str | os.PathLike[str] | None = None,
        dtype: torch.dtype | None = None,
    ) -> HiFiGANGenerator:
        """Reads a checkpoint of HiFi-GAN's authors, or its generator as a .safetensors file.

        path:   its tensors, with weight norm or without; of a checkpoint, its "generator".
        config: HiFi-GAN's config.json; None for the one beside the checkpoint. What concerns
                training in it is not looked at.
        dtype:  of the weights; None leaves that of the file.

        OSError where a file cannot be opened, ValueError where one is unsound or does not fit.
        """
        config_path = Path(path).parent / "config.json" if config is None else Path(config)
        options = read_json(config_path)
        if "num_mels" in options:
            options["in_channels"] = options["num_mels"]
        known = inspect.signature(cls).parameters
        try:
            with torch.device("meta"):
                model = cls(**{key: value for key, value in options.items() if key in known})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{config_path}: {error}") from None
        state = read_state(path, "generator")
        if dtype is not None:
            state = {name: tensor.to(dtype) for name, tensor in state.items()}
        return assign_state(model, set(state), fetch_from(state, str(path)), str(path))
