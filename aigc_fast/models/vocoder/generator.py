"""What the generators of HiFi-GAN and BigVGAN share: upsamplings, residual blocks after each."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from aigc_fast.io.hf_folder import read_json
from aigc_fast.models.state import assign_state, fetch_from
from aigc_fast.nn._conv1d import is_fused, upsample
from aigc_fast.nn._upsampling import in_parts, mean

from .blocks import MakeActivation, ResBlock, ResBlock1, ResBlock2
from .checkpoint import read_state
from .checks import check_blocks, check_rates, check_size

Model = TypeVar("Model", bound="Generator")


class Generator(nn.Module):
    """A convolution, upsamplings that halve the channels, and the convolution to one channel.

    The arguments are those of `HiFiGANGenerator`; activation makes what blocks have in place of
    leaky ReLUs. A subclass gives the slope before upsamplings and, in `_waveform`, what follows
    them. Attribute: `hop`, samples of a frame.
    """

    _slope: float

    def __init__(
        self,
        upsample_rates: Sequence[int],
        upsample_kernel_sizes: Sequence[int],
        upsample_initial_channel: int,
        resblock_kernel_sizes: Sequence[int],
        resblock_dilation_sizes: Sequence[Sequence[int]],
        resblock: str,
        in_channels: int,
        bias: bool,
        activation: MakeActivation | None = None,
    ) -> None:
        super().__init__()
        check_rates(upsample_rates, upsample_kernel_sizes)
        check_blocks(resblock, resblock_kernel_sizes, resblock_dilation_sizes)
        channels = check_size("upsample_initial_channel", upsample_initial_channel)
        check_size("in_channels", in_channels)
        if channels % 2 ** len(upsample_rates):
            raise ValueError(
                f"upsample_initial_channel must be divisible by 2 for each of upsample_rates "
                f"({len(upsample_rates)}), got {channels}"
            )
        self.hop = prod(upsample_rates)
        self.conv_pre = nn.Conv1d(in_channels, channels, 7, padding=3)
        self.ups, self.resblocks = nn.ModuleList(), nn.ModuleList()
        block = ResBlock1 if resblock == "1" else ResBlock2
        for rate, kernel in zip(upsample_rates, upsample_kernel_sizes, strict=True):
            padding = (kernel - rate) // 2
            self.ups.append(
                nn.ConvTranspose1d(channels, channels // 2, kernel, rate, padding=padding)
            )
            channels //= 2
            for size, dilations in zip(resblock_kernel_sizes, resblock_dilation_sizes, strict=True):
                self.resblocks.append(block(channels, size, dilations, activation))
        self.conv_post = nn.Conv1d(channels, 1, 7, padding=3, bias=bias)

    def _upsampled(self, x: Tensor) -> Tensor:
        """The waveform of what the first convolution gives."""
        for i in range(len(self.ups)):
            stage = partial(self._stage, i=i)
            if is_fused(self.conv_post, x):  # in training the parts would be kept beside the whole
                reach = max(block.reach for block in self._blocks(i)) + self._waveform_reach
                x = in_parts(stage, x, self._up(i), reach)
            else:
                x = stage(x)
        return x

    def _stage(self, x: Tensor, i: int) -> Tensor:
        """The i-th upsampling and its blocks; with the last of them, the waveform."""
        x = mean(self._blocks(i), upsample(x, self._up(i), self._slope))
        return x if i < len(self.ups) - 1 else self._waveform(x)

    def _waveform(self, x: Tensor) -> Tensor:
        """(batch, channels, samples) to (batch, 1, samples) in [-1, 1]."""
        raise NotImplementedError

    @property
    def _waveform_reach(self) -> int:
        """Steps to either side that a sample of `_waveform` depends on."""
        return int(self.conv_post.padding[0])

    def _up(self, i: int) -> nn.ConvTranspose1d:
        return cast(nn.ConvTranspose1d, self.ups[i])

    def _blocks(self, i: int) -> list[ResBlock]:
        each = len(self.resblocks) // len(self.ups)
        return [cast(ResBlock, block) for block in self.resblocks[i * each : (i + 1) * each]]

    @classmethod
    def from_config(cls: type[Model], config: Mapping[str, Any]) -> Model:
        """A model of what the authors' config.json holds, with new weights.

        TypeError and ValueError as for its arguments; what else there is is not looked at.
        """
        options = dict(config)
        if "num_mels" in options:
            options["in_channels"] = options["num_mels"]
        known = inspect.signature(cls).parameters
        return cls(**{key: value for key, value in options.items() if key in known})

    @classmethod
    def from_pretrained(
        cls: type[Model],
        path: str | os.PathLike[str],
        config: str | os.PathLike[str] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Model:
        """Reads a checkpoint of the model's authors, or its generator as a .safetensors file.

        path:   its tensors, with weight norm or without; of a checkpoint, its "generator".
        config: the authors' config.json; None for the one beside the checkpoint. What concerns
                training in it is not looked at.
        dtype:  of the weights; None leaves that of the file.

        OSError where a file cannot be opened, ValueError where one is unsound or does not fit.
        """
        config_path = Path(path).parent / "config.json" if config is None else Path(config)
        try:
            with torch.device("meta"):
                model = cls.from_config(read_json(config_path))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{config_path}: {error}") from None
        state = read_state(path, "generator")
        if dtype is not None:
            state = {name: tensor.to(dtype) for name, tensor in state.items()}
        return assign_state(model, set(state), fetch_from(state, str(path)), str(path))
