"""Convolutions that CPUs make of fewer products, with derivatives of any order.

Of y = conv(x, weight), linear in both, the gradient of x is a transposed convolution of that of y,
and the gradient of weight a third operator; their own derivatives are these three again.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aigc_fast import _libraries
from aigc_fast._devices import (
    has_bfloat16_instructions,
    has_fast_bfloat16,
    torch_multiplies,
)
from aigc_fast.ops import _conv4x4
from aigc_fast.ops._autograd import OpFunction, asked_for, transforming, wanted
from aigc_fast.ops._checks import plain_on_cpu
from aigc_fast.ops._layout import to_planes
from aigc_fast.ops._registry import FLOATS
from aigc_fast.ops.conv3x3 import _conv3x3, _conv3x3_backward_input, _conv3x3_backward_weight

#: Multiply-adds from which a few more microseconds a call are worth it.
_LEAST = 2**20


class Kind(NamedTuple):
    """One kernel size, stride and padding."""

    kernel: int
    stride: int
    padding: int
    #: (x, weight, bias), the same of the transposed convolution, and (gradient of y, x)
    conv: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    transpose: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    weight_gradient: Callable[[Tensor, Tensor], Tensor]
    #: rows and columns of the outputs of a tile
    tile: tuple[int, int]
    #: how many outputs tiles may have for one that is inside the image
    waste: float
    #: pixels up to which it pays in bfloat16, where the CPU has vector instructions for that
    bfloat16_pixels: int


def _conv3x3_biased(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _conv3x3([x], weight, bias, None, None, 1.0)


def _conv3x3_transpose(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = _conv3x3_backward_input(x, weight)
    return y if bias is None else y + bias[:, None, None]


CONV3X3 = Kind(
    3, 1, 1, _conv3x3_biased, _conv3x3_transpose, _conv3x3_backward_weight, (2, 2), 1.8, 256
)
#: With 7.5 products for each output of a tile, 10 for each of the image.
CONV4X4 = Kind(
    4, 2, 1, _conv4x4.conv4x4, _conv4x4.conv_transpose4x4, _conv4x4.conv4x4_backward_weight,
    (2, 4), 1.34, 0,
)  # fmt: skip


def kind_of(weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> Kind | None:
    """What a convolution, transposed or not, is made of, if it has enough channels."""
    if min(weight.shape[:2]) >= 16:
        for kind in (CONV3X3, CONV4X4):
            if is_of(kind, weight, stride, padding, dilation, groups):
                return kind
    return None


def is_of(
    kind: Kind, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int
) -> bool:
    return (
        weight.shape[2:] == (kind.kernel, kind.kernel)
        and _is(stride, kind.stride)
        and (_is(padding, kind.padding) or (padding == "same" and kind.stride == 1))
        and _is(dilation, 1)
        and groups == 1
    )


def _is(value: Any, wanted: int) -> bool:
    """Whether an argument of one number or two says so; torch refuses 1.0 and True."""
    values = list(value) if isinstance(value, tuple | list) else [value, value]
    return values == [wanted, wanted] and all(type(v) is int for v in values)


def pays(kind: Kind, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> bool:
    """Whether our products serve these tensors, and take less time than torch's."""
    into, out = (0, 1) if transposed else (1, 0)
    step = 1 if transposed else kind.stride
    return (
        x.dim() == 4
        and x.shape[1] == weight.shape[into]
        and x.shape[2] % step == x.shape[3] % step == 0
        # Sums of fewer terms are less exact than torch's, for weight's gradient.
        and x.numel() >= 64 * x.shape[1]
        and x.numel() * weight.shape[out] * 9 >= _LEAST
        and _waste(kind, x.shape[2] // step, x.shape[3] // step) <= kind.waste
        and (bias is None or bias.shape == weight.shape[out : out + 1])
        and plain_on_cpu((x, weight, bias), (x.dtype,))
        and x.numel() <= _most_pixels(kind, x.dtype) * x.shape[1]
        and not torch.is_autocast_enabled("cpu")
        and not transforming()
    )


def _waste(kind: Kind, height: int, width: int) -> float:
    """Outputs of all tiles for each of y, of a transposed convolution for each pixel of x."""
    down, across = kind.tile
    return -(height // -down) * down * -(width // -across) * across / (height * width)


@functools.cache
def _most_pixels(kind: Kind, dtype: torch.dtype) -> float:
    """Up to how many pixels our products take less time on this processor."""
    if not are_faster():
        return 0
    if dtype is torch.bfloat16 and has_bfloat16_instructions():
        return 0 if has_fast_bfloat16("cpu") else kind.bfloat16_pixels
    if dtype is torch.float16 and torch_multiplies(torch.float16):
        return 0
    return math.inf if dtype in FLOATS else 0


def are_faster() -> bool:
    """Whether the library that runs here was compiled for AVX2 or AVX-512."""
    return _libraries.loaded_level() in ("avx512", "avx2")


def convolve(
    kind: Kind, transposed: bool, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The convolution or the transposed one, differentiable."""
    if wanted(x, weight, bias):
        return _Convolution.call(kind, transposed, x, weight, bias)
    return (kind.transpose if transposed else kind.conv)(x, weight, bias)


def in_torch_order(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """y, a convolution of x, in the memory order of torch's, for a model of someone else: it may
    `view` it, and its dropout draws in that order. Differentiable."""
    if y.is_contiguous() or y.dim() != 4 or _is_last(x) or _is_last(weight) or not _is_last(y):
        return y
    return _Planes.call(y) if wanted(y) else to_planes(y)


def _is_last(x: Tensor) -> bool:
    """Channels innermost to torch's convolutions, which see strides of dimensions of one too."""
    least = 1
    for dim in (1, 3, 2, 0):
        if x.stride(dim) < least or (dim == 0 and x.stride(1) == least):
            return False
        least = x.stride(dim) * max(1, x.shape[dim])
    return True


class _Planes(OpFunction):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return to_planes(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0]


def _weight_gradient(kind: Kind, grad: Tensor, x: Tensor) -> Tensor:
    if wanted(grad, x):
        return _WeightGradient.call(kind, grad, x)
    return kind.weight_gradient(grad, x)


class _Convolution(OpFunction):
    @staticmethod
    def forward(
        ctx: Any, kind: Kind, transposed: bool, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.kind, ctx.transposed = kind, transposed
        ctx.set_materialize_grads(False)  # of y that no loss depends on
        ctx.save_for_backward(x, weight)
        return (kind.transpose if transposed else kind.conv)(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        if grad is None:
            return (None,) * 5
        *_, by_x, by_weight, by_bias = asked_for(ctx)
        # The gradient of the smaller image comes first: that is y, of a transposed convolution x.
        pair = (x, grad) if ctx.transposed else (grad, x)
        return (
            None,
            None,
            convolve(ctx.kind, not ctx.transposed, grad, weight) if by_x else None,
            _weight_gradient(ctx.kind, *pair) if by_weight else None,
            grad.sum((0, 2, 3)) if by_bias else None,
        )


class _WeightGradient(OpFunction):
    @staticmethod
    def forward(ctx: Any, kind: Kind, grad: Tensor, x: Tensor) -> Tensor:
        ctx.kind = kind
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, x)
        return kind.weight_gradient(grad, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        (by_result,), (grad, x) = grads, ctx.saved_tensors
        if by_result is None:
            return (None,) * 3
        _, by_grad, by_x = asked_for(ctx)
        return (
            None,
            convolve(ctx.kind, False, x, by_result) if by_grad else None,
            convolve(ctx.kind, True, grad, by_result) if by_x else None,
        )
