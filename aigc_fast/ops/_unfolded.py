"""Convolutions with large weights and few outputs, as one product of matrices.

oneDNN packs the weight of a convolution in every call; of 3 x 3 x 1280 x 1280, as in the depth of a
U-Net, that is most of the 21 ms that 32 outputs take on two Zen 5 cores. A product with the weight
as it lies in memory takes 4.4 (in bfloat16 2.5, not 3.8; of twice as many inputs 4.9, not 22).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aigc_fast._devices import has_fast_bfloat16
from aigc_fast.ops._autograd import transforming
from aigc_fast.ops._checks import plain_on_cpu
from aigc_fast.ops.linear import DTYPES, lags, linear

#: Elements of a weight from which the product of so many outputs, of all images, is the faster one.
_OUTPUTS = {1 << 20: 32, 1 << 23: 128}
_OUTPUTS_BFLOAT16 = {1 << 22: 32}


def may_serve(weight: Tensor, groups: int) -> bool:
    """Whether there are images so small that it pays, on this processor."""
    return groups == 1 and any(_most_outputs(weight, dtype) for dtype in DTYPES)


def serves(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> bool:
    """Whether it pays for these arguments of conv2d."""
    return (
        groups == 1
        and x.dim() == weight.dim() == 4
        and x.shape[1] == weight.shape[1]
        and all(map(_is_plain, (stride, padding, dilation), (1, 0, 1)))
        and 0
        < _outputs(x, weight, stride, padding, dilation)
        <= _most_outputs(weight, weight.dtype)
        and (bias is None or bias.shape == weight.shape[:1])
        and plain_on_cpu((x, weight, bias), (weight.dtype,))
        and not torch.is_autocast_enabled("cpu")
        and not transforming()
    )


def unfolded(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any
) -> Tensor:
    """conv2d, in channels_last memory order."""
    height, width = _sizes(x, weight, stride, padding, dilation)
    taps = F.unfold(x, weight.shape[2:], dilation, padding, stride)
    y = linear(taps.transpose(1, 2).flatten(0, 1), weight.flatten(1), bias)
    return y.view(x.shape[0], height, width, -1).permute(0, 3, 1, 2)


def _most_outputs(weight: Tensor, dtype: torch.dtype) -> int:
    slow = dtype is torch.bfloat16 and not has_fast_bfloat16("cpu")
    if not (slow or lags(dtype)):
        return 0
    most = _OUTPUTS_BFLOAT16 if slow else _OUTPUTS
    return max((count for size, count in most.items() if weight.numel() >= size), default=0)


def _is_plain(value: Any, least: int) -> bool:
    """Whether it is one number or two that torch takes too."""
    numbers = value if isinstance(value, tuple | list) else (value, value)
    return len(numbers) == 2 and all(type(n) is int and n >= least for n in numbers)


def _outputs(x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any) -> int:
    height, width = _sizes(x, weight, stride, padding, dilation)
    return x.shape[0] * height * width if height > 0 < width else 0


def _sizes(x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any) -> list[int]:
    pairs = (v if isinstance(v, tuple | list) else (v, v) for v in (stride, padding, dilation))
    return [
        (size + 2 * p - d * (kernel - 1) - 1) // s + 1
        for size, kernel, s, p, d in zip(x.shape[2:], weight.shape[2:], *pairs, strict=True)
    ]
