"""StyleGAN2's modulated convolution."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aigc_fast import ops
from aigc_fast.nn.equalized import EqualizedLinear
from aigc_fast.nn.upfirdn2d import Blur
from aigc_fast.ops._checks import check_positive


class ModulatedConv2d(nn.Module):
    """A convolution whose weights the style of each sample scales, and that may resample.

    style_dim:  width of the style vectors; `modulation` makes them scales of the input channels.
    up, down:   factors of `ops.conv2d_resample`.
    kernel:     taps of the FIR filter, used where up or down is not 1.

    State dict: weight (out_channels, in_channels, kernel_size, kernel_size), modulation.weight,
    modulation.bias, and blur.kernel where there is a filter.

    >>> ModulatedConv2d(512, 256, 3, style_dim=512, up=2)(x, style, act="lrelu")
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        style_dim: int,
        *,
        demodulate: bool = True,
        up: int = 1,
        down: int = 1,
        kernel: Sequence[float] = (1, 3, 3, 1),
    ) -> None:
        super().__init__()
        check_positive(in_channels=in_channels, kernel_size=kernel_size, style_dim=style_dim)
        check_positive(up=up, down=down)
        self.up, self.down, self.demodulate = up, down, demodulate
        self.scale = 1 / (in_channels * kernel_size**2) ** 0.5
        shape = (out_channels, in_channels, kernel_size, kernel_size)
        self.weight = nn.Parameter(torch.randn(shape))
        self.modulation = EqualizedLinear(style_dim, in_channels, bias_init=1.0)
        self.blur = Blur(kernel, upsample_factor=up) if up * down > 1 else None

    def forward(self, x: Tensor, style: Tensor, *epilogue: Tensor | None, **options: Any) -> Tensor:
        """x (batch, in_channels, H, W), style (batch, style_dim).

        epilogue: noise, strength and bias; options: act, alpha, gain and clamp, all as for
                  `ops.modulated_conv2d`.
        """
        return ops.modulated_conv2d(
            x,
            self.weight,
            self.modulation(style) * self.scale,
            *epilogue,
            demodulate=self.demodulate,
            up=self.up,
            down=self.down,
            filter=None if self.blur is None else self.blur.kernel,
            **options,
        )

    def extra_repr(self) -> str:
        out_channels, in_channels, kernel_size, _ = self.weight.shape
        return (
            f"{in_channels}, {out_channels}, kernel_size={kernel_size}, "
            f"demodulate={self.demodulate}, up={self.up}, down={self.down}"
        )
