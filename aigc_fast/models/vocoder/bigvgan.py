"""BigVGAN's generator: from mel spectrograms to waveforms through anti-aliased snakes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from aigc_fast import ops
from aigc_fast.nn import Snake, SnakeBeta
from aigc_fast.nn._conv1d import convolve
from aigc_fast.nn.bias_act import of_dtype
from aigc_fast.ops.alias_free_snake import REACH, default_filters

from .blocks import Activation
from .generator import Generator

_SNAKES = {"snake": Snake, "snakebeta": SnakeBeta}


class Filter(nn.Module):
    """The taps of a low-pass filter, (1, 1, 12), which a checkpoint brings along."""

    filter: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer(
            "filter", default_filters(torch.device("cpu"))[0].float().view(1, 1, -1)
        )


class AliasFreeActivation(Activation):
    """`ops.alias_free_snake` with the filters of its checkpoint, under their original names."""

    reach = REACH

    def __init__(self, channels: int, kind: str, log_scale: bool) -> None:
        super().__init__()
        self.act = _SNAKES[kind](channels, alpha_logscale=log_scale)
        self.upsample, self.downsample = Filter(), nn.ModuleDict({"lowpass": Filter()})

    def forward(self, x: Tensor) -> Tensor:
        alpha, beta = of_dtype(self.act.alpha, x), of_dtype(self.act.beta, x)
        up, down = self.upsample.filter, cast(Filter, self.downsample["lowpass"]).filter
        log_scale = self.act.alpha_logscale
        return ops.alias_free_snake(x, alpha, beta, up[0, 0], down[0, 0], log_scale=log_scale)


class BigVGANGenerator(Generator):
    """Mel spectrograms (batch, in_channels, frames) to waveforms (batch, 1, frames * hop).

    activation:        "snakebeta", or "snake" for one parameter in place of two.
    snake_logscale:    whether the parameters of activations are logarithms.
    use_bias_at_final: whether the last convolution has a bias.
    use_tanh_at_final: whether tanh keeps the samples in [-1, 1], or clamping.

    The other arguments, the attribute and the errors are those of `HiFiGANGenerator`; all of them
    have the names of the published config.json, in_channels being its num_mels. Names of the state
    dict are the original's too, the filters of the activations among them, whose values hold.
    Differentiable.

    The first and the last samples are those of the published code in plain torch, which is the
    definition; its fused CUDA kernel gives others.

    Source: Lee et al. 2023, arXiv:2206.04658.

    >>> BigVGANGenerator(
    ...     (4, 4, 2, 2, 2, 2), (8, 8, 4, 4, 4, 4), 512, activation="snakebeta", snake_logscale=True
    ... )  # base
    """

    _slope = 1.0  # nothing before upsamplings

    def __init__(
        self,
        upsample_rates: Sequence[int],
        upsample_kernel_sizes: Sequence[int],
        upsample_initial_channel: int,
        resblock_kernel_sizes: Sequence[int] = (3, 7, 11),
        resblock_dilation_sizes: Sequence[Sequence[int]] = ((1, 3, 5),) * 3,
        resblock: str = "1",
        *,
        activation: str,
        snake_logscale: bool,
        in_channels: int = 100,
        use_bias_at_final: bool = True,
        use_tanh_at_final: bool = True,
    ) -> None:
        if activation not in ("snake", "snakebeta"):
            raise ValueError(f'activation must be "snake" or "snakebeta", got {activation!r}')
        _check_flag("snake_logscale", snake_logscale)
        _check_flag("use_bias_at_final", use_bias_at_final)
        _check_flag("use_tanh_at_final", use_tanh_at_final)
        make = partial(AliasFreeActivation, kind=activation, log_scale=snake_logscale)
        super().__init__(
            upsample_rates, upsample_kernel_sizes, upsample_initial_channel,
            resblock_kernel_sizes, resblock_dilation_sizes, resblock, in_channels,
            use_bias_at_final, make,
        )  # fmt: skip
        self.ups = nn.ModuleList(nn.ModuleList([up]) for up in self.ups)  # as it is published
        self.activation_post = make(self.conv_post.in_channels)
        self._bound = torch.tanh if use_tanh_at_final else partial(torch.clamp, min=-1.0, max=1.0)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, in_channels, frames)."""
        return self._upsampled(convolve(x, self.conv_pre))

    def _up(self, i: int) -> nn.ConvTranspose1d:
        return cast(nn.ConvTranspose1d, cast(nn.ModuleList, self.ups[i])[0])

    def _waveform(self, x: Tensor) -> Tensor:
        return self._bound(convolve(self.activation_post(x), self.conv_post))

    @property
    def _waveform_reach(self) -> int:
        return super()._waveform_reach + self.activation_post.reach


def _check_flag(name: str, value: Any) -> None:
    if type(value) is not bool:
        raise ValueError(f"{name} must be true or false, got {value!r}")
