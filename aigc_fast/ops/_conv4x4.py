"""Convolutions of 4x4 weights with stride 2 and a border of one zero, by which GANs and
autoencoders halve images; the transposed ones, which double them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from aigc_fast.ops._checks import check_tensor
from aigc_fast.ops._layout import channels_last
from aigc_fast.ops._registry import define


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    _check_weight(x, weight, (weight.shape[0], x.shape[1], 4, 4), bias)
    if x.shape[2] % 2 or x.shape[3] % 2:
        raise ValueError(f"x must have an even height and width, got {tuple(x.shape)}")


def _check_transpose(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    _check_weight(x, weight, (x.shape[1], weight.shape[1], 4, 4), bias, 1)


def _check_weight(
    x: Tensor, weight: Tensor, shape: tuple[int, ...], bias: Tensor | None, outs: int = 0
) -> None:
    check_tensor("x", x, ndim=4)
    check_tensor("weight", weight, like=("x", x), shape=shape)
    if bias is not None:
        check_tensor("bias", bias, like=("x", x), shape=(weight.shape[outs],))


def _reference_backward_weight(grad: Tensor, x: Tensor) -> Tensor:
    weight = x.new_empty(grad.shape[1], x.shape[1], 4, 4)
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, [2, 2], [1, 1], [1, 1], False, [0, 0], 1, (False, True, False)
    )[1].contiguous()


def _check_backward_weight(grad: Tensor, x: Tensor) -> None:
    check_tensor("x", x, ndim=4)
    batch, _channels, height, width = x.shape
    check_tensor("grad", grad, like=("x", x), ndim=4)
    check_tensor("grad", grad, shape=(batch, grad.shape[1], height // 2, width // 2))


conv4x4 = define(
    "conv4x4(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    lambda x, weight, bias: channels_last(F.conv2d(x, weight, bias, 2, 1)),
    _check,
    stem=None,
)
conv_transpose4x4 = define(
    "conv_transpose4x4(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    lambda x, weight, bias: channels_last(F.conv_transpose2d(x, weight, bias, 2, 1)),
    _check_transpose,
    stem=None,
)
conv4x4_backward_weight = define(
    "conv4x4_backward_weight(Tensor grad, Tensor x) -> Tensor",
    _reference_backward_weight,
    _check_backward_weight,
    stem=None,
)
#: The same in the order (out, 4, 4, in), of channels that are multiples of 16; in bfloat16 only, on
#: CPUs that multiply it.
conv4x4_backward_taps = define(
    "conv4x4_backward_taps(Tensor grad, Tensor x) -> Tensor",
    lambda grad, x: _reference_backward_weight(grad, x).permute(0, 2, 3, 1).contiguous(),
    _check_backward_weight,
    stem=None,
)
