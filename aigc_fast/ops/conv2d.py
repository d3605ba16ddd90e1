"""Convolutions of images: common ones on CPUs by fewer products, all others torch's."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aigc_fast._devices import torch_multiplies
from aigc_fast.ops import _conv_bfloat16, _unfolded
from aigc_fast.ops._autograd import transforming
from aigc_fast.ops._checks import plain_on_cpu
from aigc_fast.ops._winograd import CONV4X4, convolve, is_of, kind_of, pays

Pair = int | tuple[int, int]


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """y = conv(x, weight) + bias, as torch.nn.functional.conv2d: same arguments and errors.

    x:      (batch, in_channels, height, width).
    weight: (out_channels, in_channels / groups, kernel height, kernel width).
    bias:   (out_channels,) or None.

    On a CPU with AVX2 or AVX-512 two kinds run by Winograd's algorithm, derivatives included, where
    there are at least 16 input and 16 output channels:

    - kernel 3, stride 1, padding 1: 4 products an output in place of 9;
    - kernel 4, stride 2, padding 1: 7.5 in place of 16, where tiles of 2 x 4 outputs cover y with
      at most a third more outputs than it has (4 x 4, 8 x 8, nearly every size above 9 x 9).

    That is in float64 and float32, in a 16-bit dtype for which the CPU has no instructions, and for
    kernel 3 in bfloat16 up to 256 pixels on CPUs without AMX. It is about as exact as torch's
    function. y is then in channels_last memory order, whatever that of x is. Where torch's y is
    infinite it may be NaN, and for kernel 4 outputs beside these too.

    Kernel 4, stride 2, padding 1 in bfloat16, under autocast too, on a CPU that has instructions
    for it but no AMX: forward by torch, derivatives by fewer and larger products than torch's.

    Weights of a million elements and more with up to 32 outputs of all images: one product of
    matrices, where `linear` has products of its own (in bfloat16 without AMX from 4 million on). y
    is in channels_last memory order too.

    Where torch has no products of a 16-bit dtype on the CPU, all others run in float32 inside.

    Everything else is torch's own function, and so is every call under autocast but for the
    above, within torch.compile, torch.func and forward-mode derivatives. Differentiable to any
    order.

    Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, arXiv:1509.09308.
    """
    if not torch.compiler.is_compiling():
        y = _ours(False, x, weight, bias, (stride, padding, dilation, groups))
        if y is not None:
            return y
        if _unfolded.serves(x, weight, bias, stride, padding, dilation, groups):
            return _unfolded.unfolded(x, weight, bias, stride, padding, dilation)
    return _torchs(F.conv2d, x, weight, bias, stride, padding, dilation, groups)


def conv_transpose2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    output_padding: Pair = 0,
    groups: int = 1,
    dilation: Pair = 1,
) -> Tensor:
    """The transposed convolution, as torch.nn.functional.conv_transpose2d: same arguments and
    errors.

    x:      (batch, in_channels, height, width).
    weight: (in_channels, out_channels / groups, kernel height, kernel width).
    bias:   (out_channels,) or None.

    Kernel 3, stride 1, padding 1, and kernel 4, stride 2, padding 1 run as `conv2d` says (for
    kernel 4 the tiles are of x); all others are torch's, in float32 inside where it says so.
    """
    if not torch.compiler.is_compiling() and output_padding in (0, (0, 0), [0, 0]):
        y = _ours(True, x, weight, bias, (stride, padding, dilation, groups))
        if y is not None:
            return y
    how = stride, padding, output_padding, groups, dilation
    return _torchs(F.conv_transpose2d, x, weight, bias, *how)


def _torchs(
    function: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any
) -> Tensor:
    """In float32 inside where torch has no products of the dtype."""
    if (
        torch.compiler.is_compiling()
        or torch_multiplies(x.dtype)
        or not plain_on_cpu((x, weight, bias), (x.dtype,))
        or torch.is_autocast_enabled("cpu")
        or transforming()
    ):
        return function(x, weight, bias, *how)
    wide = None if bias is None else bias.float()
    return function(x.float(), weight.float(), wide, *how).to(x.dtype)


def _ours(
    transposed: bool, x: Tensor, weight: Tensor, bias: Tensor | None, how: tuple[Any, ...]
) -> Tensor | None:
    """None where torch's function is the better one."""
    kind = kind_of(weight, *how)
    if kind is not None and pays(kind, x, weight, bias, transposed):
        return convolve(kind, transposed, x, weight, bias)
    if is_of(CONV4X4, weight, *how) and _conv_bfloat16.serves(x, weight, bias, transposed):
        low = None if bias is None else bias.bfloat16()
        return convolve(_conv_bfloat16.KIND, transposed, x.bfloat16(), weight.bfloat16(), low)
    return None
