"""FIR upsampling, downsampling and blur of images; the filter is the buffer `kernel`."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from aigc_fast import ops


class _Filtered(nn.Module):
    kernel: Tensor

    def __init__(
        self, kernel: Sequence[float] | Tensor, gain: float, up: int, down: int, pad: tuple
    ) -> None:
        super().__init__()
        taps = torch.as_tensor(kernel, dtype=torch.float32)
        if taps.dim() == 1:
            taps = torch.outer(taps, taps)
        self.register_buffer("kernel", taps * (gain / taps.sum()))
        self.up, self.down, self.pad = up, down, pad

    def forward(self, x: Tensor) -> Tensor:
        return ops.upfirdn2d(x, self.kernel, self.up, self.down, self.pad)

    def extra_repr(self) -> str:
        return f"{tuple(self.kernel.shape)}, up={self.up}, down={self.down}, pad={self.pad}"


class Upsample2d(_Filtered):
    """(N, C, H, W) to (N, C, H factor, W factor), as StyleGAN2 upsamples its skip connections.

    kernel: taps of both directions, or a matrix; normalised to the sum factor^2.

    >>> Upsample2d([1, 3, 3, 1])
    """

    def __init__(self, kernel: Sequence[float] | Tensor = (1, 3, 3, 1), factor: int = 2) -> None:
        rest = len(kernel) - factor
        pad = ((rest + 1) // 2 + factor - 1, rest // 2)
        super().__init__(kernel, float(factor**2), factor, 1, pad * 2)


class Downsample2d(_Filtered):
    """(N, C, H, W) to (N, C, H / factor, W / factor).

    kernel: taps of both directions, or a matrix; normalised to the sum 1.
    """

    def __init__(self, kernel: Sequence[float] | Tensor = (1, 3, 3, 1), factor: int = 2) -> None:
        rest = len(kernel) - factor
        super().__init__(kernel, 1.0, 1, factor, ((rest + 1) // 2, rest // 2) * 2)


class Blur(_Filtered):
    """The filter alone, for before a strided convolution or after a transposed one.

    pad:             (before, after), in both directions
    upsample_factor: of the convolution whose zeros the filter fills: its gain is the square
    """

    def __init__(
        self,
        kernel: Sequence[float] | Tensor = (1, 3, 3, 1),
        pad: tuple[int, int] = (2, 1),
        upsample_factor: int = 1,
    ) -> None:
        super().__init__(kernel, float(upsample_factor**2), 1, 1, tuple(pad) * 2)
