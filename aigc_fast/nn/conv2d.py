"""Conv2d, ConvTranspose2d."""

from typing import Any

from torch import Tensor, nn

from aigc_fast import ops


class Conv2d(nn.Conv2d):
    """nn.Conv2d by `ops.conv2d`: arguments, weight, bias and state dict as there.

    >>> Conv2d(64, 64, 3, padding=1)
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return convolve(self, input, weight, bias)


class ConvTranspose2d(nn.ConvTranspose2d):
    """nn.ConvTranspose2d by `ops.conv_transpose2d`, as `Conv2d`.

    >>> ConvTranspose2d(64, 32, 4, 2, 1)
    """

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if output_size is not None:
            return super().forward(input, output_size)
        how: Any = self.stride, self.padding, self.output_padding, self.groups, self.dilation
        return ops.conv_transpose2d(input, self.weight, self.bias, *how)


def convolve(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What conv, of any subclass of nn.Conv2d, makes of x with this weight and bias."""
    if conv.padding_mode != "zeros":
        return nn.Conv2d._conv_forward(conv, x, weight, bias)
    how: Any = conv.stride, conv.padding, conv.dilation, conv.groups
    return ops.conv2d(x, weight, bias, *how)
