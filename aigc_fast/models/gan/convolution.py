"""The convolutions of super-resolution generators, fused where no gradient is wanted."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aigc_fast import ops
from aigc_fast.nn._conv1d import is_fused


def convolve(
    x: Tensor | list[Tensor],
    conv: nn.Module,
    slope: Tensor | None = None,
    residual: Tensor | None = None,
    gain: float = 1.0,
) -> Tensor:
    """residual + gain * prelu(conv(x)), several x being channels of one: see `ops.conv3x3`.

    Where that is not `is_fused` it is a chain of torch's operations, which in 16 bits take
    channels_last: any other order costs as much again.
    """
    assert isinstance(conv, nn.Conv2d)
    xs = [x] if isinstance(x, Tensor) else x
    if is_fused(conv, *xs, slope, residual):
        return ops.conv3x3(xs, conv.weight, conv.bias, slope, residual, gain)
    together = xs[0] if len(xs) == 1 else torch.cat(xs, 1)
    if conv.weight.dtype.itemsize == 2:
        together = together.contiguous(memory_format=torch.channels_last)
    y = conv(together)
    y = y if slope is None else F.prelu(y, slope)
    y = y if gain == 1 else y * gain
    return y if residual is None else y + residual
