"""Leaky ReLU between an upsampling and a downsampling filter: the activation of StyleGAN3."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aigc_fast.ops._activations import check_clamp
from aigc_fast.ops._autograd import OpFunction
from aigc_fast.ops._checks import check_device, check_tensor
from aigc_fast.ops._layout import order_of, wide
from aigc_fast.ops._registry import FLOATS, define
from aigc_fast.ops.upfirdn2d import _pair, _sides, _taps
from aigc_fast.ops.upfirdn2d import _reference as upfirdn2d_reference

#: pixels whose bits share a word of the mask
_WORD = 32


def filtered_lrelu(
    x: Tensor,
    up_filter: Tensor | None = None,
    down_filter: Tensor | None = None,
    bias: Tensor | None = None,
    up: int | Sequence[int] = 1,
    down: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    gain: float = math.sqrt(2),
    slope: float = 0.2,
    clamp: float | None = None,
    flip_filter: bool = False,
) -> Tensor:
    """Upsampling, leaky ReLU and downsampling in one pass: an activation that folds no frequencies.

    1. x + bias;
    2. upfirdn2d with `up_filter`, `up` and `padding`, times up_x up_y gain;
    3. leaky ReLU of that slope, then the clamp to [-clamp, clamp];
    4. upfirdn2d with `down_filter` and `down`.

    x:           shape (N, C, H, W), float64/32/16 or bfloat16; contiguous or channels_last, which
                 y keeps. channels_last is copied to planes and back.
    up_filter, down_filter: shape (height, width), or (taps,) for a separable filter with these taps
                 in both directions. Any floating dtype; used in fp32 (fp64 for fp64). They have no
                 gradient. None: one tap of 1.
    bias:        shape (C,), dtype of x, or None.
    up, down:    one factor, or (x, y): horizontal, vertical.
    padding:     p, or (x, y), or (left, right, top, bottom), in pixels of the upsampled image;
                 negative crops.
    gain, slope: of the leaky ReLU: its values are multiplied by gain, negative ones by slope too.
    clamp:       limit on its magnitude, at least 0, or None.
    flip_filter: True for correlations in place of convolutions, with both filters.

    Computes in fp32 and rounds once. The C++ kernel holds a few rows of the upsampled image; the
    Triton version is upfirdn2d's kernel twice and one between them, with that image in fp32 in
    memory. Saves two bits a pixel of it (negative, clamped) in place of x. The operator is
    piecewise linear: its derivative is the same kernel with the filters exchanged and the bits
    read, and so on for any order.

    Raises TypeError or ValueError for a wrong dtype, shape, device or clamp, factors below 1, a
    filter that is larger than its padded image, and one that requires a gradient.

    Source: Karras et al. 2021, arXiv:2106.12423 (StyleGAN3), and its argument order.
    """
    check_clamp(clamp)
    first = torch.ones(1, device=x.device) if up_filter is None else up_filter
    second = torch.ones(1, device=x.device) if down_filter is None else down_filter
    for name, taps in (("up_filter", first), ("down_filter", second)):
        if taps.requires_grad:
            raise ValueError(f"{name} must not require a gradient: it has none")
    (up_x, up_y), (down_x, down_y) = _pair("up", up), _pair("down", down)
    geometry = [up_x, up_y, down_x, down_y, *_sides(padding)]
    options = (geometry, flip_filter, up_x * up_y * gain, slope, clamp)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _FilteredLrelu.call(x, first, second, bias, *options)
    return _filtered_lrelu(x, first, second, bias, *options, False)[0]


# A geometry is up_x, up_y, down_x, down_y, then the padding of the first filter and, where it has
# twelve numbers, that of the second.


def _first(geometry: Sequence[int]) -> list[int]:
    """The first filter's part, as upfirdn2d takes it."""
    return [*geometry[:2], 1, 1, *geometry[4:8]]


def _second(geometry: Sequence[int]) -> list[int]:
    return [1, 1, *geometry[2:4], *(geometry[8:] or (0, 0, 0, 0))]


def _between(x: Tensor, first: Tensor, geometry: Sequence[int]) -> tuple[int, int]:
    """(height, width) of the image between the filters."""
    up_x, up_y, _, _, left, right, top, bottom = geometry[:8]
    height, width = _taps(first)
    return (
        x.shape[2] * up_y + top + bottom - height + 1,
        x.shape[3] * up_x + left + right - width + 1,
    )


def _pack(bits: Tensor) -> Tensor:
    """Booleans (..., width) as int32 (..., words): pixel i is bit i % 32 of word i // 32."""
    words = -(-bits.shape[-1] // _WORD)
    bits = F.pad(bits.long(), (0, words * _WORD - bits.shape[-1])).unflatten(-1, (words, _WORD))
    return (bits << torch.arange(_WORD, device=bits.device)).sum(-1).to(torch.int32)


def _unpack(words: Tensor, width: int) -> Tensor:
    bits = words.unsqueeze(-1) >> torch.arange(_WORD, device=words.device, dtype=torch.int32)
    return (bits & 1).bool().flatten(-2)[..., :width]


def _reference(
    x: Tensor, up_filter: Tensor, down_filter: Tensor, bias: Tensor | None,
    geometry: Sequence[int], flip: bool, gain: float, slope: float, clamp: float | None,
    keep_mask: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    z = wide(x).contiguous()
    if bias is not None:
        z = z + wide(bias).view(1, -1, 1, 1)
    z = upfirdn2d_reference(z, up_filter, _first(geometry), flip, gain)
    negative = z <= 0
    z = torch.where(negative, z * slope, z)
    limit = math.inf if clamp is None else clamp
    mask = x.new_empty(0, dtype=torch.int32)
    if keep_mask:
        mask = torch.stack([_pack(negative), _pack(z.abs() > limit)], 3)
    y = upfirdn2d_reference(z.clamp(-limit, limit), down_filter, _second(geometry), flip, 1.0)
    return y.to(x.dtype).contiguous(memory_format=order_of(x)), mask


def _reference_mask(
    x: Tensor, mask: Tensor, first: Tensor, second: Tensor, geometry: Sequence[int], flip: bool,
    gain: float, slope: float,
) -> Tensor:  # fmt: skip
    z = upfirdn2d_reference(wide(x).contiguous(), first, _first(geometry), flip, gain)
    negative, clamped = _unpack(mask, z.shape[3]).unbind(3)
    z = torch.where(negative, z * slope, z).masked_fill(clamped, 0)
    y = upfirdn2d_reference(z, second, _second(geometry), flip, 1.0)
    return y.to(x.dtype).contiguous(memory_format=order_of(x))


def _check_filters(x: Tensor, first: Tensor, second: Tensor, geometry: Sequence[int]) -> None:
    check_tensor("x", x, ndim=4)
    if x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"x must have at least one pixel, got shape {tuple(x.shape)}")
    for name, taps in (("up_filter", first), ("down_filter", second)):
        check_tensor(name, taps, dtypes=FLOATS)
        if taps.dim() not in (1, 2) or taps.numel() == 0:
            shape = tuple(taps.shape)
            raise ValueError(f"{name} must have shape (height, width) or (taps,), got {shape}")
        check_device(name, taps, ("x", x))
    _, _, _, _, left, right, top, bottom = _second(geometry)
    height, width = _between(x, first, geometry)
    for name, taps, sides in (
        ("up_filter", first, (height - 1 + _taps(first)[0], width - 1 + _taps(first)[1])),
        ("down_filter", second, (height + top + bottom, width + left + right)),
    ):
        if sides[0] < _taps(taps)[0] or sides[1] < _taps(taps)[1]:
            raise ValueError(
                f"{name} must not be larger than the padded image {sides}, got {_taps(taps)}"
            )


def _check(
    x: Tensor, up_filter: Tensor, down_filter: Tensor, bias: Tensor | None,
    geometry: Sequence[int], *_: Any,
) -> None:  # fmt: skip
    _check_filters(x, up_filter, down_filter, geometry)
    if bias is not None:
        check_tensor("bias", bias, like=("x", x), shape=(x.shape[1],))


def _check_mask(
    x: Tensor, mask: Tensor, first: Tensor, second: Tensor, geometry: Sequence[int], *_: Any
) -> None:
    _check_filters(x, first, second, geometry)
    height, width = _between(x, first, geometry)
    shape = (*x.shape[:2], height, 2, -(-width // _WORD))
    check_tensor("mask", mask, dtypes=(torch.int32,), shape=shape)


_filtered_lrelu = define(
    "filtered_lrelu(Tensor x, Tensor up_filter, Tensor down_filter, Tensor? bias, int[] geometry,"
    " bool flip, float gain, float slope, float? clamp, bool keep_mask) -> (Tensor, Tensor)",
    _reference,
    _check,
    stem="filtered_lrelu",
)
_filtered_mask = define(
    "filtered_mask(Tensor x, Tensor mask, Tensor first, Tensor second, int[] geometry, bool flip,"
    " float gain, float slope) -> Tensor",
    _reference_mask,
    _check_mask,
    stem="filtered_lrelu",
)


def _adjoint(
    dy: Tensor | None, shape: Sequence[int], mask: Tensor, first: Tensor, second: Tensor,
    geometry: Sequence[int], flip: bool, gain: float, slope: float,
) -> Tensor | None:  # fmt: skip
    """The gradient of x: each filter becomes its adjoint, the bits stay where they are. None for
    None, see bias_act_gradients."""
    if dy is None:
        return None
    up_x, up_y, down_x, down_y = geometry[:4]
    left, _, top, _, left2, _, top2, _ = [*geometry, 0, 0, 0, 0][4:12]
    height = mask.shape[2]
    width = shape[3] * up_x + geometry[4] + geometry[5] - _taps(first)[1] + 1
    back = [
        down_x, down_y, up_x, up_y,
        _taps(second)[1] - left2 - 1, width - dy.shape[3] * down_x + left2,
        _taps(second)[0] - top2 - 1, height - dy.shape[2] * down_y + top2,
        _taps(first)[1] - left - 1, shape[3] * up_x - width + left - up_x + 1,
        _taps(first)[0] - top - 1, shape[2] * up_y - height + top - up_y + 1,
    ]  # fmt: skip
    args = (dy, mask, second, first, back, not flip, gain, slope)
    if torch.is_grad_enabled() and dy.requires_grad:
        return _FilteredMask.call(*args)
    return _filtered_mask(*args)


class _FilteredLrelu(OpFunction):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, up_filter: Tensor, down_filter: Tensor, bias: Tensor | None,
        geometry: list[int], flip: bool, gain: float, slope: float, clamp: float | None,
    ) -> Tensor:  # fmt: skip
        options = (geometry, flip, gain, slope)
        y, mask = _filtered_lrelu(x, up_filter, down_filter, bias, *options, clamp, True)
        ctx.options, ctx.shape = options, x.shape
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mask, up_filter, down_filter, bias)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple:
        *saved, bias = ctx.saved_tensors
        dx = _adjoint(dy, ctx.shape, *saved, *ctx.options)
        dbias = None
        if ctx.needs_input_grad[3]:
            dbias = torch.zeros_like(bias) if dx is None else dx.sum((0, 2, 3))
        return dx, None, None, dbias, None, None, None, None, None


class _FilteredMask(OpFunction):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mask: Tensor, first: Tensor, second: Tensor, geometry: list[int],
        flip: bool, gain: float, slope: float,
    ) -> Tensor:  # fmt: skip
        ctx.options, ctx.shape = (geometry, flip, gain, slope), x.shape
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mask, first, second)
        return _filtered_mask(x, mask, first, second, geometry, flip, gain, slope)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple:
        dx = _adjoint(dy, ctx.shape, *ctx.saved_tensors, *ctx.options)
        return dx, None, None, None, None, None, None, None
