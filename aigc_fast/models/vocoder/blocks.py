"""The residual blocks of HiFi-GAN and BigVGAN, which differ in what bends a sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from aigc_fast.nn._conv1d import convolve
from aigc_fast.nn._upsampling import residual_pairs, with_input

from .layers import same_conv

#: of the leaky ReLU in blocks and before upsamplings
SLOPE = 0.1


class Activation(nn.Module):
    """One that reads a sequence: `reach` is how many steps to either side."""

    reach: int


#: channels -> an activation of them
MakeActivation = Callable[[int], Activation]


class ResBlock(nn.Module):
    """What both kinds of block share.

    activation: of each convolution one is made for its inputs, named `activations`; None for leaky
                ReLUs, which the convolutions take along.
    """

    activations: nn.ModuleList | None

    def _add_activations(
        self, channels: int, count: int, activation: MakeActivation | None
    ) -> None:
        made = None if activation is None else [activation(channels) for _ in range(count)]
        self.activations = None if made is None else nn.ModuleList(made)

    @property
    def reach(self) -> int:
        """Steps to either side that a result depends on."""
        convs = [m for m in self.modules() if isinstance(m, nn.Conv1d)]
        activations = [m for m in self.modules() if isinstance(m, Activation)]
        return sum(int(conv.padding[0]) for conv in convs) + sum(a.reach for a in activations)

    def _convolve(
        self,
        x: Tensor,
        conv: nn.Module,
        number: int,
        residuals: Sequence[Tensor] = (),
        gain: float = 1.0,
    ) -> Tensor:
        """gain * (conv(act(x)) + sum(residuals)), act being the activation of that number."""
        if self.activations is None:
            return convolve(x, conv, SLOPE, residuals, gain)
        return convolve(self.activations[number](x), conv, 1.0, residuals, gain)


class ResBlock1(ResBlock):
    """x + conv(act(conv(act(x)))) three times, the first convolution of each pair dilated."""

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        dilations: Sequence[int],
        activation: MakeActivation | None = None,
    ) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(same_conv(channels, kernel_size, d) for d in dilations)
        self.convs2 = nn.ModuleList(same_conv(channels, kernel_size) for _ in dilations)
        self._add_activations(channels, 2 * len(dilations), activation)

    def forward(self, x: Tensor, residuals: Sequence[Tensor] = (), gain: float = 1.0) -> Tensor:
        """gain * (block(x) + sum(residuals))."""
        return residual_pairs(self._convolve, x, self.convs1, self.convs2, residuals, gain)


class ResBlock2(ResBlock):
    """x + conv(act(x)) twice, dilated."""

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        dilations: Sequence[int],
        activation: MakeActivation | None = None,
    ) -> None:
        super().__init__()
        self.convs = nn.ModuleList(same_conv(channels, kernel_size, d) for d in dilations)
        self._add_activations(channels, len(dilations), activation)

    def forward(self, x: Tensor, residuals: Sequence[Tensor] = (), gain: float = 1.0) -> Tensor:
        """gain * (block(x) + sum(residuals))."""
        last = len(self.convs) - 1
        for i, conv in enumerate(self.convs):
            x = self._convolve(x, conv, i, *with_input(x, i == last, residuals, gain))
        return x
