"""How long each phoneme lasts: VITS's two predictors of the logarithm of its frames."""

from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aigc_fast.nn._conv1d import convolve

from .layers import ChannelNorm, masked, same_conv
from .spline import inverse_spline


class DepthwiseConvs(nn.Module):
    """x + gelu(norm(pointwise(gelu(norm(depthwise(x)))))) for ever larger dilations."""

    def __init__(self, channels: int, kernel_size: int, num_layers: int) -> None:
        super().__init__()
        self.convs_sep = nn.ModuleList()
        for i in range(num_layers):
            dilation = kernel_size**i
            conv = same_conv(channels, kernel_size, dilation, groups=channels)
            self.convs_sep.append(conv)
        self.convs_1x1 = nn.ModuleList(nn.Conv1d(channels, channels, 1) for _ in self.convs_sep)
        self.norms_1 = nn.ModuleList(ChannelNorm(channels) for _ in self.convs_sep)
        self.norms_2 = nn.ModuleList(ChannelNorm(channels) for _ in self.convs_sep)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        layers = zip(self.convs_sep, self.norms_1, self.convs_1x1, self.norms_2, strict=True)
        for depthwise, norm_1, pointwise, norm_2 in layers:
            y = F.gelu(norm_1(convolve(masked(x, mask), depthwise)))
            x = x + F.gelu(norm_2(convolve(y, pointwise)))
        return masked(x, mask)


class ElementwiseAffine(nn.Module):
    """y = m + exp(logs) x forwards; this is (x - m) exp(-logs)."""

    def __init__(self) -> None:
        super().__init__()
        self.m, self.logs = nn.Parameter(torch.zeros(2, 1)), nn.Parameter(torch.zeros(2, 1))

    def forward(self, x: Tensor, mask: Tensor | None, condition: Tensor) -> Tensor:
        return masked((x - self.m) * torch.exp(-self.logs), mask)


class SplineCoupling(nn.Module):
    """[x1, s(x2)], s a spline whose knots x1 and a condition decide; backwards."""

    def __init__(self, channels: int, kernel_size: int, num_layers: int, num_bins: int) -> None:
        super().__init__()
        self.num_bins = num_bins
        self.pre = nn.Conv1d(1, channels, 1)
        self.convs = DepthwiseConvs(channels, kernel_size, num_layers)
        self.proj = nn.Conv1d(channels, 3 * num_bins - 1, 1)

    def forward(self, x: Tensor, mask: Tensor | None, condition: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=1)
        y = self.convs(convolve(first, self.pre) + condition, mask)
        y = masked(convolve(y, self.proj), mask).transpose(1, 2)
        widths, heights, slopes = y.split([self.num_bins, self.num_bins, self.num_bins - 1], dim=2)
        scale = 1 / sqrt(self.pre.out_channels)
        second = inverse_spline(second[:, 0], widths * scale, heights * scale, slopes)
        return masked(torch.cat([first, second[:, None]], 1), mask)


class StochasticDurationPredictor(nn.Module):
    """Noise to the logarithm of durations, by a flow that phonemes condition; backwards alone.

    Names are the original's, where every second entry of `flows` turns two channels around. The
    coupling next to the affine layer works on what nothing hears any more: it is left out.
    """

    def __init__(
        self, channels: int, kernel_size: int, num_layers: int, num_bins: int, num_flows: int,
        speaker: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.pre = nn.Conv1d(channels, channels, 1)
        self.convs = DepthwiseConvs(channels, kernel_size, num_layers)
        self.proj = nn.Conv1d(channels, channels, 1)
        self.cond = nn.Conv1d(speaker, channels, 1) if speaker else None
        self.flows = nn.ModuleDict({"0": ElementwiseAffine()})
        for i in range(1, num_flows):
            coupling = SplineCoupling(channels, kernel_size, num_layers, num_bins)
            self.flows[str(2 * i + 1)] = coupling

    def forward(
        self, x: Tensor, mask: Tensor | None, speaker: Tensor | None, noise: Tensor
    ) -> Tensor:
        """x: (batch, channels, n), states of phonemes; noise: (batch, 2, n), scaled. The result is
        (batch, 1, n)."""
        x = convolve(x, self.pre)
        if self.cond is not None and speaker is not None:
            x = x + convolve(speaker, self.cond)
        x = masked(convolve(self.convs(x, mask), self.proj), mask)
        z = noise
        for flow in reversed(list(self.flows.values())):
            z = flow(z.flip(1), mask, x)
        return z[:, :1]


class DurationPredictor(nn.Module):
    """The mean of the logarithm of durations: two convolutions, each before ReLU and norm."""

    def __init__(self, channels: int, filter_channels: int, kernel_size: int, speaker: int) -> None:
        super().__init__()
        self.conv_1 = same_conv(channels, kernel_size, outputs=filter_channels)
        self.norm_1 = ChannelNorm(filter_channels)
        self.conv_2 = same_conv(filter_channels, kernel_size)
        self.norm_2 = ChannelNorm(filter_channels)
        self.proj = nn.Conv1d(filter_channels, 1, 1)
        self.cond = nn.Conv1d(speaker, channels, 1) if speaker else None

    def forward(self, x: Tensor, mask: Tensor | None, speaker: Tensor | None) -> Tensor:
        """x: (batch, channels, n); the result is (batch, 1, n)."""
        if self.cond is not None and speaker is not None:
            x = x + convolve(speaker, self.cond)
        x = self.norm_1(convolve(masked(x, mask), self.conv_1).relu())
        x = self.norm_2(convolve(masked(x, mask), self.conv_2).relu())
        return masked(convolve(masked(x, mask), self.proj), mask)
