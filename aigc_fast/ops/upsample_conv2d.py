"""Nearest upsampling by 2 and the convolution after it, as one transposed convolution."""

import torch
import torch.nn.functional as F
from torch import Tensor

from aigc_fast.ops._autocast import under_autocast
from aigc_fast.ops._checks import check_tensor
from aigc_fast.ops._layout import channels_last
from aigc_fast.ops._winograd import in_torch_order
from aigc_fast.ops.conv2d import conv2d

#: Pixels of x from which a CPU makes up for the time that the sums of weights take.
_PIXELS = 1024


def upsample_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = conv2d(interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding="same").

    x:      (batch, in_channels, H, W), float64/32/16 or bfloat16.
    weight: (out_channels, in_channels, kernel height, kernel width) of odd sizes, dtype of x.
    bias:   (out_channels,), dtype of x, or None.
    y:      (batch, out_channels, 2 H, 2 W), in the memory order of torch's convolution.

    Of the k x k pixels that the kernel meets, many are copies of one pixel of x; their weights are
    added first. The sums make a transposed convolution of stride 2 with a kernel of k + 1: for
    k = 3 four products an output in place of nine, and no upsampled x in memory. The convolution
    is torch's. In 16 bits the sums are rounded once. In float32 y is more exact than that of the
    two calls, but the gradient of x may be 2.3 times as wrong as theirs (at 256 channels; 1.3 times
    on average): it is one sum of 16 x out_channels products in place of four of 9 x out_channels.

    On a CPU, where adding the weights takes a while, an x of fewer than 1,024 pixels is upsampled
    first and goes to `conv2d`, whose Winograd algorithm takes about as few products.

    Differentiable to any order. Under autocast x and weight may differ in dtype, as they may for
    torch's convolution.

    Raises TypeError or ValueError for a wrong dtype, shape or device.

    Source: nearest upsampling is a transposed convolution with a kernel of ones, and of two
    convolutions in a row the kernels convolve.
    """
    _check(x, weight, bias)
    on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and x.numel() < _PIXELS * x.shape[1]:
        y = conv2d(F.interpolate(x, scale_factor=2.0), weight, bias, padding="same")
        return in_torch_order(y, x, weight)
    folded = fold(weight)
    padding = weight.shape[2] // 2, weight.shape[3] // 2
    if not on_cpu:
        return F.conv_transpose2d(x, folded, bias, stride=2, padding=padding)
    # The order that oneDNN packs soonest: in any other that takes longer than its products may.
    y = F.conv_transpose2d(x, channels_last(folded), bias, stride=2, padding=padding)
    return in_torch_order(y, x, weight)


def fold(weight: Tensor) -> Tensor:
    """The weight of the transposed convolution, (in, out, kernel height + 1, kernel width + 1)."""
    height, width = weight.shape[2:]
    copies = torch.kron(_copies(weight, height), _copies(weight, width))
    return (weight.flatten(2) @ copies).unflatten(2, (height + 1, width + 1)).transpose(0, 1)


def _copies(weight: Tensor, size: int) -> Tensor:
    """(size, size + 1): which weights of a row meet copies of the same pixel. A transposed
    convolution turns its kernel over: so does this."""
    taps = torch.eye(size, dtype=weight.dtype, device=weight.device)
    return (F.pad(taps, (0, 1)) + F.pad(taps, (1, 0))).flip(1)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_tensor("x", x, ndim=4)
    like = None if under_autocast(x.device.type) else ("x", x)
    check_tensor("weight", weight, like=like, ndim=4)
    if weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"weight must have the channels of x ({x.shape[1]}) second, got {tuple(weight.shape)}"
        )
    if weight.shape[2] % 2 == 0 or weight.shape[3] % 2 == 0:
        raise ValueError(f"weight must have a kernel of odd size, got {tuple(weight.shape[2:])}")
    if bias is not None:
        check_tensor("bias", bias, like=like, shape=weight.shape[:1])
