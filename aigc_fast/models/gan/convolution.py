"""The convolutions of super-resolution generators, fused where no gradient is wanted."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aigc_fast import ops
from aigc_fast._devices import has_bfloat16_instructions


def convolve(
    x: Tensor | list[Tensor],
    conv: nn.Module,
    slope: Tensor | None = None,
    residual: Tensor | None = None,
    gain: float = 1.0,
) -> Tensor:
    """residual + gain * prelu(conv(x)), several x being channels of one: see `ops.conv3x3`.

    For training it is a chain of torch's operations; on a GPU too, whose convolution is cuDNN's,
    and on a CPU in 16 bits for which it has no products. In 16 bits torch takes channels_last: any
    other order costs as much again.
    """
    assert isinstance(conv, nn.Conv2d)
    xs = [x] if isinstance(x, Tensor) else x
    tensors = (*xs, conv.weight, conv.bias, slope, residual)
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    dtype = conv.weight.dtype
    fast = dtype.itemsize > 2 or (dtype == torch.bfloat16 and has_bfloat16_instructions())
    if not wanted and fast and xs[0].device.type == "cpu":
        return ops.conv3x3(xs, conv.weight, conv.bias, slope, residual, gain)
    together = xs[0] if len(xs) == 1 else torch.cat(xs, 1)
    if dtype.itemsize == 2:
        together = together.contiguous(memory_format=torch.channels_last)
    y = conv(together)
    y = y if slope is None else F.prelu(y, slope)
    y = y if gain == 1 else y * gain
    return y if residual is None else y + residual
