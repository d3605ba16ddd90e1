"""Convolutions of images: 3x3 ones on CPUs by fewer products than torch's, all others torch's."""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from aigc_fast import _libraries
from aigc_fast._devices import (
    has_bfloat16_instructions,
    has_fast_bfloat16,
    has_float16_instructions,
)
from aigc_fast.ops._autograd import OpFunction, transforming
from aigc_fast.ops._registry import FLOATS
from aigc_fast.ops.conv3x3 import (
    _conv3x3,
    _conv3x3_backward_input,
    _conv3x3_backward_weight,
)

#: Multiply-adds from which a few more microseconds a call are worth it.
_LEAST = 2**20

_PLAIN = (Tensor, torch.nn.Parameter, FakeTensor)

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

    On a CPU with AVX2 or AVX-512, 3x3 convolutions of stride 1 with a border of zeros as wide as
    their reach run by `ops.conv3x3`, from 16 inputs and 9 outputs on: by Winograd's algorithm,
    with 4 products an output in place of 9, and about as exact as torch's. So do both gradients.
    In float64 and float32, and in a 16-bit dtype for which the CPU has no instructions; in bfloat16
    without AMX up to 256 pixels too. y is then in channels_last memory order, whatever that of x
    is; an infinity or a NaN in x makes up to 16 outputs NaN.

    Everywhere else, under autocast, within torch.compile, torch.func and forward-mode derivatives
    it is torch's own function. Differentiable as often as one likes.

    Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, arXiv:1509.09308.
    """
    if (
        torch.compiler.is_compiling()
        or not is_served(weight, stride, padding, dilation, groups)
        or not _pays(x, weight, bias)
    ):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or _wants(bias)):
        return _Conv2d.call(x, weight, bias)
    return _conv3x3([x], weight, bias, None, None, 1.0)


def _wants(bias: Tensor | None) -> bool:
    return bias is not None and bias.requires_grad


def is_served(weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> bool:
    """Whether there are fewer products for such a convolution."""
    return (
        weight.shape[2:] == (3, 3)
        and weight.shape[1] >= 16
        and weight.shape[0] > 8
        and (padding == "same" or _is_one(padding))
        and _is_one(stride)
        and _is_one(dilation)
        and groups == 1
    )


def _is_one(value: Any) -> bool:
    return value == 1 or value == (1, 1) or value == [1, 1]


def _pays(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        x.dim() == 4
        and x.shape[1] == weight.shape[1]
        and min(x.shape[2:]) > 1
        # Sums of fewer terms are less exact than torch's, for weight's gradient.
        and x.numel() >= 64 * x.shape[1]
        and x.numel() * weight.shape[0] * 9 >= _LEAST
        and (bias is None or bias.shape == weight.shape[:1])
        and all(
            type(t) in _PLAIN  # other subclasses know torch's function only
            and t.dtype is x.dtype
            and t.device.type == "cpu"
            and t.layout is torch.strided
            for t in (x, weight, x if bias is None else bias)
        )
        and x.numel() <= _most_pixels(x.dtype) * x.shape[1]
        and not torch.is_autocast_enabled("cpu")
        and not transforming()
    )


@functools.cache
def _most_pixels(dtype: torch.dtype) -> float:
    """Up to how many pixels our products take less time on this processor."""
    library = _libraries.loaded.get("cpu")
    if library is None or library.stem not in ("cpu_avx512", "cpu_avx2"):
        return 0
    if dtype is torch.bfloat16 and has_bfloat16_instructions():
        return 0 if has_fast_bfloat16("cpu") else 256
    if dtype is torch.float16 and has_float16_instructions():
        return 0
    return math.inf if dtype in FLOATS else 0


class _Conv2d(OpFunction):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _conv3x3([x], weight, bias, None, None, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        by_x, by_weight, by_bias = ctx.needs_input_grad
        if torch.is_grad_enabled():  # to be differentiated again
            one = [1, 1]
            return torch.ops.aten.convolution_backward(
                grad, x, weight, [weight.shape[0]], one, one, one, False, [0, 0], 1,
                (by_x, by_weight, by_bias),
            )  # fmt: skip
        return (
            _conv3x3_backward_input(grad, weight) if by_x else None,
            _conv3x3_backward_weight(grad, x) if by_weight else None,
            grad.sum((0, 2, 3)) if by_bias else None,
        )
