"""What the parts of vocoders share."""

import torch
from torch import Tensor, nn

from aigc_fast import ops


class ChannelNorm(nn.Module):
    """Layer norm over the channels of (batch, channels, time)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma, self.beta = (
            nn.Parameter(torch.ones(channels)),
            nn.Parameter(torch.zeros(channels)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x.transpose(1, 2), self.gamma, self.beta).transpose(1, 2)


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """x (batch, channels, time) with zeros where mask (batch, 1, time) has them; None has none."""
    return x if mask is None else x * mask


def length_mask(lengths: Tensor, longest: int, dtype: torch.dtype) -> Tensor | None:
    """(batch, 1, longest), 1 before a row's length and 0 from there; None where all is 1."""
    inside = torch.arange(longest, device=lengths.device) < lengths[:, None]
    return None if bool(inside.all()) else inside[:, None].to(dtype)


def same_conv(
    channels: int, kernel_size: int, dilation: int = 1, outputs: int | None = None, groups: int = 1
) -> nn.Conv1d:
    """A convolution whose result is as long as what it reads, of an odd kernel; outputs: None for
    as many channels as it reads."""
    padding = dilation * (kernel_size - 1) // 2
    return nn.Conv1d(channels, outputs or channels, kernel_size, 1, padding, dilation, groups)
