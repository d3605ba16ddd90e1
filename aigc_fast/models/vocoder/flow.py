"""The flow of VITS, backwards: from samples of the prior to latents that the decoder hears."""

import torch
from torch import Tensor, nn

from aigc_fast import ops
from aigc_fast.nn._conv1d import convolve

from .layers import masked, same_conv


class WaveNet(nn.Module):
    """Gated dilated convolutions whose parts are summed (van den Oord et al. 2016,
    arXiv:1609.03499), with a speaker's vector in each gate."""

    def __init__(
        self, channels: int, kernel_size: int, dilation_rate: int, num_layers: int, speaker: int
    ) -> None:
        super().__init__()
        self.in_layers, self.res_skip_layers = nn.ModuleList(), nn.ModuleList()
        self.cond_layer = nn.Conv1d(speaker, 2 * channels * num_layers, 1) if speaker else None
        for i in range(num_layers):
            dilation = dilation_rate**i
            self.in_layers.append(same_conv(channels, kernel_size, dilation, 2 * channels))
            outputs = 2 * channels if i < num_layers - 1 else channels  # the last goes on nowhere
            self.res_skip_layers.append(nn.Conv1d(channels, outputs, 1))

    def forward(self, x: Tensor, mask: Tensor | None, speaker: Tensor | None) -> Tensor:
        conditions: tuple[Tensor | None, ...] = (None,) * len(self.in_layers)
        if self.cond_layer is not None and speaker is not None:
            conditions = convolve(speaker, self.cond_layer).chunk(len(self.in_layers), dim=1)
        first, last = slice(x.shape[1]), slice(-x.shape[1], None)
        total: list[Tensor] = []  # none or one
        layers = zip(self.in_layers, self.res_skip_layers, conditions, strict=True)
        for i, (in_layer, res_skip_layer, condition) in enumerate(layers):
            value, gate = (convolve(x, in_layer, outputs=half) for half in (first, last))
            if condition is not None:
                value, gate = value + condition[:, first], gate + condition[:, last]
            y = ops.bias_act(value, act="tanh") * torch.sigmoid(gate)
            total = [convolve(y, res_skip_layer, residuals=total, outputs=last)]
            if i < len(self.in_layers) - 1:
                x = masked(convolve(y, res_skip_layer, residuals=[x], outputs=first), mask)
        return masked(total[0], mask)


class ResidualCoupling(nn.Module):
    """y = [x1, x2 + m(x1)] forwards; this is [x1, x2 - m(x1)]."""

    def __init__(self, latent_channels: int, channels: int, *wavenet: int) -> None:
        super().__init__()
        half = latent_channels // 2
        self.pre = nn.Conv1d(half, channels, 1)
        self.enc = WaveNet(channels, *wavenet)
        self.post = nn.Conv1d(channels, half, 1)

    def forward(self, x: Tensor, mask: Tensor | None, speaker: Tensor | None) -> Tensor:
        first, second = x.chunk(2, dim=1)
        y = self.enc(masked(convolve(first, self.pre), mask), mask, speaker)
        mean = masked(convolve(y, self.post), mask)
        return torch.cat([first, masked(second - mean, mask)], 1)


class ResidualCouplingFlow(nn.Module):
    """Couplings with the channels turned around after each; backwards.

    Names are the original's, where every second entry of `flows` turns the channels around.
    """

    def __init__(self, num_flows: int, *coupling: int) -> None:
        super().__init__()
        self.flows = nn.ModuleDict(
            {str(2 * i): ResidualCoupling(*coupling) for i in range(num_flows)}
        )

    def forward(self, x: Tensor, mask: Tensor | None, speaker: Tensor | None) -> Tensor:
        for flow in reversed(list(self.flows.values())):
            x = flow(x.flip(1), mask, speaker)
        return x
