"""The compact generator of Real-ESRGAN: a chain of convolutions at the image's own size."""

from __future__ import annotations

import os

import torch.nn.functional as F
from torch import Tensor, nn

from ..inputs import check_input
from .convolution import convolve


class SRVGGNetCompact(nn.Module):
    """Images (batch, num_in_ch, height, width) in [0, 1] to `scale` times their height and width.

    num_feat, num_conv: channels and convolutions between the first and the last one.
    upscale:            what the network multiplies sizes by.
    scale:              the sizes of the result, if not `upscale`: it is then resized by bicubic
                        interpolation, as the published models for 2 and 3 are.

    Names of the state dict and the other arguments are Real-ESRGAN's (activation: PReLU).

    Source: Wang et al. 2021, arXiv:2107.10833, and its code (SRVGGNetCompact).
    """

    def __init__(
        self,
        num_in_ch: int = 3,
        num_out_ch: int = 3,
        num_feat: int = 64,
        num_conv: int = 16,
        upscale: int = 4,
        scale: int | None = None,
    ) -> None:
        super().__init__()
        self.num_in_ch, self.upscale, self.scale = num_in_ch, upscale, scale or upscale
        layers: list[nn.Module] = []
        for i in range(num_conv + 1):
            layers.append(nn.Conv2d(num_feat if i else num_in_ch, num_feat, 3, padding=1))
            layers.append(nn.PReLU(num_feat))
        layers.append(nn.Conv2d(num_feat, num_out_ch * upscale**2, 3, padding=1))
        self.body = nn.ModuleList(layers)

    @property
    def reach(self) -> int:
        """How many pixels away an input pixel can change a result."""
        return len(self.body) // 2 + 1 + (self.scale != self.upscale)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> SRVGGNetCompact:
        """Reads ncnn's files, .param and .bin; errors as for `load_generator`."""
        from .load_ncnn import read_generator

        return read_generator(path, cls)

    def forward(self, x: Tensor) -> Tensor:
        *pairs, last = self.body
        check_input("x", x, self.num_in_ch, "height", "width")
        y = x
        for conv, act in zip(pairs[::2], pairs[1::2], strict=True):
            y = convolve(y, conv, act.weight)  # type: ignore[arg-type]
        y = convolve(y, last)
        # Contiguous: what shuffling makes of channels_last is neither, and slow to resize.
        y = F.pixel_shuffle(y.contiguous(), self.upscale)
        y = y + F.interpolate(x.contiguous(), scale_factor=self.upscale, mode="nearest")
        if self.scale != self.upscale:
            factor = self.scale / self.upscale
            y = F.interpolate(y, scale_factor=factor, mode="bicubic", recompute_scale_factor=True)
        return y
