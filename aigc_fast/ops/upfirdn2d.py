"""Upsampling, filtering and downsampling of images in one pass, and bias_act with it."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aigc_fast.ops._activations import DEFAULT_ALPHA, activate, resolve
from aigc_fast.ops._autograd import OpFunction
from aigc_fast.ops._checks import check_device, check_tensor
from aigc_fast.ops._layout import order_of, wide
from aigc_fast.ops._registry import FLOATS, define
from aigc_fast.ops.bias_act import bias_act, bias_act_gradients


def upfirdn2d(
    x: Tensor,
    filter: Tensor,
    up: int | Sequence[int] = 1,
    down: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
    bias: Tensor | None = None,
    act: str = "linear",
    alpha: float | None = None,
    act_gain: float | None = None,
    clamp: float | None = None,
) -> Tensor:
    """Inserts zeros, pads, convolves with an FIR filter and keeps every `down`-th pixel.

    1. after every pixel of x, up - 1 zeros;
    2. `padding` zeros at the sides, or fewer pixels where it is negative;
    3. the convolution with `filter` (the correlation, if flip_filter) where it fits whole, times
       `gain`;
    4. every down-th pixel, from the first;
    5. bias_act(..., bias, act, alpha, act_gain, clamp) with its defaults, in the same pass.

    x:           shape (N, C, H, W), float64/32/16 or bfloat16; contiguous or channels_last, which
                 y keeps; other strides are copied once.
    filter:      shape (height, width), or (taps,) for a separable filter with these taps in both
                 directions. Any floating dtype; used in fp32 (fp64 for fp64). It has no gradient.
    up, down:    one factor, or (x, y): horizontal, vertical.
    padding:     p, or (x, y), or (left, right, top, bottom), in pixels of the upsampled image;
                 negative crops.
    flip_filter: True for a correlation in place of the convolution.
    gain:        factor on the filter.
    bias:        shape (C,), dtype of x, or None.
    act, alpha, clamp: as for `bias_act`.
    act_gain:    the gain of `bias_act`.

    y has height (H up + top + bottom - filter height) // down + 1; width likewise. Computes in fp32
    and rounds once. The derivative is an upfirdn2d with up and down exchanged and the filter
    flipped, and so on for any order. Bytes that must move: x once and y once.

    Raises TypeError or ValueError for a wrong dtype, shape, device, act, alpha or clamp, factors
    below 1, and a filter that is larger than the padded image.

    Source: the operation of StyleGAN2 (Karras et al. 2020, arXiv:1912.04958).
    """
    if filter.requires_grad:
        raise ValueError("filter must not require a gradient: it has none")
    (up_x, up_y), (down_x, down_y) = _pair("up", up), _pair("down", down)
    geometry = [up_x, up_y, down_x, down_y, *_sides(padding)]
    number, resolved, default_gain, from_sign = resolve(act, alpha, clamp)
    plain = bias is None and number == 0 and act_gain is None and clamp is None
    factor = default_gain if act_gain is None else act_gain
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        if plain:
            return _Upfirdn2d.call(x, filter, geometry, flip_filter, gain)
        if from_sign and factor > 0 and resolved >= 0:
            # The sign of y tells the slope: what lies before the activation need not be kept.
            epilogue = (number, factor, clamp, resolved)
            return _Upfirdn2dAct.call(x, filter, bias, geometry, flip_filter, gain, epilogue)
        z = _Upfirdn2d.call(x, filter, geometry, flip_filter, gain)
        return bias_act(z, bias, 1, act, alpha, act_gain, clamp)
    if plain:
        return _upfirdn2d(x, filter, geometry, flip_filter, gain)
    return _upfirdn2d(x, filter, geometry, flip_filter, gain, bias, number, factor, clamp, resolved)


def _pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2:
        raise ValueError(f"{name} must be one factor or two, got {value}")
    x, y = pair
    if x < 1 or y < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return x, y


def _sides(padding: int | Sequence[int]) -> tuple[int, int, int, int]:
    if isinstance(padding, int):
        return padding, padding, padding, padding
    if len(padding) == 2:
        x, y = padding
        return x, x, y, y
    if len(padding) != 4:
        raise ValueError(f"padding must have 1, 2 or 4 numbers, got {tuple(padding)}")
    left, right, top, bottom = padding
    return left, right, top, bottom


def _taps(filter: Tensor) -> tuple[int, int]:
    """(height, width) of the filter."""
    return filter.shape[0], filter.shape[-1]


def _size(x: Tensor, filter: Tensor, geometry: Sequence[int]) -> tuple[int, int]:
    up_x, up_y, down_x, down_y, left, right, top, bottom = geometry
    height, width = _taps(filter)
    return (
        (x.shape[2] * up_y + top + bottom - height) // down_y + 1,
        (x.shape[3] * up_x + left + right - width) // down_x + 1,
    )


def _reference(
    x: Tensor, filter: Tensor, geometry: Sequence[int], flip: bool, gain: float,
    bias: Tensor | None = None, act: int = 0, act_gain: float = 1.0, clamp: float | None = None,
    alpha: float = DEFAULT_ALPHA,
) -> Tensor:  # fmt: skip
    up_x, up_y, down_x, down_y, left, right, top, bottom = geometry
    n, c, h, w = x.shape
    z = wide(x).reshape(n * c, 1, h, 1, w, 1)
    z = F.pad(z, [0, up_x - 1, 0, 0, 0, up_y - 1]).reshape(n * c, 1, h * up_y, w * up_x)
    # Negative sides crop, and may crop what the opposite side adds.
    z = F.pad(z, [max(side, 0) for side in (left, right, top, bottom)])
    z = F.pad(z, [min(side, 0) for side in (left, right, top, bottom)])
    taps = filter.to(z.dtype)
    if not flip:
        taps = taps.flip(list(range(taps.dim())))
    if taps.dim() == 2:
        z = F.conv2d(z, taps[None, None])
    else:
        z = F.conv2d(F.conv2d(z, taps[None, None, :, None]), taps[None, None, None, :])
    z = z[:, :, ::down_y, ::down_x].reshape(n, c, *_size(x, filter, geometry)) * gain
    if bias is not None:
        z = z + bias.to(z.dtype).view(1, -1, 1, 1)
    z = activate(z, act, alpha) * act_gain
    if clamp is not None:
        z = z.clamp(-clamp, clamp)
    return z.to(x.dtype).contiguous(memory_format=order_of(x))


def _check(
    x: Tensor, filter: Tensor, geometry: Sequence[int], flip: bool, gain: float,
    bias: Tensor | None = None, *_: Any,
) -> None:  # fmt: skip
    check_tensor("x", x, ndim=4)
    check_tensor("filter", filter, dtypes=FLOATS)
    if filter.dim() not in (1, 2) or filter.numel() == 0:
        raise ValueError(
            f"filter must have shape (height, width) or (taps,), got {tuple(filter.shape)}"
        )
    check_device("filter", filter, ("x", x))
    if bias is not None:
        check_tensor("bias", bias, like=("x", x), shape=(x.shape[1],))
    if x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"x must have at least one pixel, got shape {tuple(x.shape)}")
    up_x, up_y, left, right, top, bottom = *geometry[:2], *geometry[4:]
    padded = (x.shape[2] * up_y + top + bottom, x.shape[3] * up_x + left + right)
    if padded[0] < _taps(filter)[0] or padded[1] < _taps(filter)[1]:
        raise ValueError(
            f"filter must not be larger than the upsampled and padded image {padded},"
            f" got {_taps(filter)}"
        )


_upfirdn2d = define(
    "upfirdn2d(Tensor x, Tensor filter, int[] geometry, bool flip, float gain, Tensor? bias=None,"
    f" int act=0, float act_gain=1.0, float? clamp=None, float alpha={DEFAULT_ALPHA}) -> Tensor",
    _reference,
    _check,
    stem="upfirdn2d",
)


def _adjoint(
    dy: Tensor | None, shape: Sequence[int], filter: Tensor, geometry: Sequence[int], flip: bool,
    gain: float,
) -> Tensor | None:  # fmt: skip
    """The gradient of x, as an upfirdn2d of that of y; None for None, see bias_act_gradients."""
    if dy is None:
        return None
    up_x, up_y, down_x, down_y, left, _, top, _ = geometry
    height, width = _taps(filter)
    back = [
        down_x, down_y, up_x, up_y,
        width - left - 1, shape[3] * up_x - dy.shape[3] * down_x + left - up_x + 1,
        height - top - 1, shape[2] * up_y - dy.shape[2] * down_y + top - up_y + 1,
    ]  # fmt: skip
    if torch.is_grad_enabled() and dy.requires_grad:
        return _Upfirdn2d.call(dy, filter, back, not flip, gain)
    return _upfirdn2d(dy, filter, back, not flip, gain)


class _Upfirdn2d(OpFunction):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, filter: Tensor, geometry: list[int], flip: bool, gain: float
    ) -> Tensor:
        ctx.options = (geometry, flip, gain)
        ctx.shape = x.shape
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(filter)
        return _upfirdn2d(x, filter, geometry, flip, gain)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple:
        (filter,) = ctx.saved_tensors
        return _adjoint(dy, ctx.shape, filter, *ctx.options), None, None, None, None


class _Upfirdn2dAct(OpFunction):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, filter: Tensor, bias: Tensor | None, geometry: list[int], flip: bool,
        gain: float, epilogue: tuple,
    ) -> Tensor:  # fmt: skip
        y = _upfirdn2d(x, filter, geometry, flip, gain, bias, *epilogue)
        ctx.options, ctx.epilogue = (geometry, flip, gain), epilogue
        ctx.shape = x.shape
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y, filter, bias)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple:
        y, filter, bias = ctx.saved_tensors
        act, act_gain, clamp, alpha = ctx.epilogue
        options = (act, 1, act_gain, clamp, alpha, True)
        dz, dbias = bias_act_gradients(dy, y, bias, options)
        dx = _adjoint(dz, ctx.shape, filter, *ctx.options)
        return dx, None, dbias, None, None, None, None
