"""The discriminators of HiFi-GAN and BigVGAN in plain torch, from the papers and the names of the
published files."""

import warnings

import torch
import torch.nn.functional as F
from torch import nn

PERIODS = (2, 3, 5, 7, 11)
#: channels out, kernel, stride, groups; in units of a quarter of the first's
PERIOD_CONVS = ((1, 5, 3), (4, 5, 3), (16, 5, 3), (32, 5, 3), (32, 5, 1))
SCALE_CONVS = (
    (1, 15, 1, 1), (1, 41, 2, 4), (2, 41, 2, 16), (4, 41, 4, 16), (8, 41, 4, 16), (8, 41, 1, 16),
    (8, 5, 1, 1),
)  # fmt: skip


def weight_norm(module):
    """The one whose names the published files have, which torch calls deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module)


class Part(nn.Module):
    def __init__(self, convs, conv_post, norm, period=None):
        super().__init__()
        self.convs = nn.ModuleList(norm(conv) for conv in convs)
        self.conv_post, self.period = norm(conv_post), period

    def forward(self, x):
        if self.period is not None:
            batch, channels, length = x.shape
            if length % self.period:
                x = F.pad(x, (0, self.period - length % self.period), "reflect")
            x = x.view(batch, channels, x.shape[2] // self.period, self.period)
        features = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.1)
            features.append(x)
        return [*features, self.conv_post(x)]


class MultiPeriod(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.discriminators = nn.ModuleList()
        for period in PERIODS:
            convs, last = [], 1
            for times, kernel, stride in PERIOD_CONVS:
                convs.append(nn.Conv2d(last, times * channels, (kernel, 1), (stride, 1), (2, 0)))
                last = times * channels
            post = nn.Conv2d(last, 1, (3, 1), 1, (1, 0))
            self.discriminators.append(Part(convs, post, weight_norm, period))

    def forward(self, x):
        return [discriminator(x) for discriminator in self.discriminators]


class MultiScale(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.discriminators = nn.ModuleList()
        for number in range(3):
            convs, last = [], 1
            for times, kernel, stride, groups in SCALE_CONVS:
                out = times * channels
                convs.append(nn.Conv1d(last, out, kernel, stride, kernel // 2, groups=groups))
                last = out
            norm = weight_norm if number else nn.utils.spectral_norm
            self.discriminators.append(Part(convs, nn.Conv1d(last, 1, 3, 1, 1), norm))
        self.meanpools = nn.ModuleList([nn.AvgPool1d(4, 2, 2), nn.AvgPool1d(4, 2, 2)])

    def forward(self, x):
        found = []
        for number, discriminator in enumerate(self.discriminators):
            if number:
                x = self.meanpools[number - 1](x)
            found.append(discriminator(x))
        return found


class Resolution(Part):
    def __init__(self, channels, size, hop, window):
        convs = [nn.Conv2d(1, channels, (3, 9), 1, (1, 4))]
        convs += [nn.Conv2d(channels, channels, (3, 9), (1, 2), (1, 4)) for _ in range(3)]
        convs += [nn.Conv2d(channels, channels, 3, 1, 1)]
        super().__init__(convs, nn.Conv2d(channels, 1, 3, 1, 1), weight_norm)
        self.how = size, hop, window

    def forward(self, x):
        size, hop, window = self.how
        x = F.pad(x, ((size - hop) // 2, (size - hop) // 2), "reflect").squeeze(1)
        rectangle = torch.ones(window)
        parts = torch.stft(x, size, hop, window, rectangle, center=False, return_complex=True)
        return super().forward(parts.abs()[:, None])


class MultiResolution(nn.Module):
    def __init__(self, channels):
        super().__init__()
        resolutions = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))
        self.discriminators = nn.ModuleList(Resolution(channels, *how) for how in resolutions)

    def forward(self, x):
        return [discriminator(x) for discriminator in self.discriminators]
