"""Convolutions of video that look at no later frame, without a padded copy of it."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from aigc_fast.ops._autocast import under_autocast
from aigc_fast.ops._checks import check_tensor
from aigc_fast.ops._winograd import are_faster, kind_of
from aigc_fast.ops.conv2d import Pair, conv2d

Triple = int | tuple[int, int, int]
#: Multiply-adds of a sample with one pixel of the kernel, from which the calls for each pay.
_LEAST = 2**21


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Triple = 1,
    padding: Pair = 0,
    dilation: Triple = 1,
    groups: int = 1,
    history: Tensor | None = None,
) -> Tensor:
    """y = conv3d(x with frames before its first one, weight) + bias, so that frame t of y depends
    on the frames up to stride * t of x alone.

    x:        (batch, in_channels, frames, height, width), float64/32/16 or bfloat16.
    weight:   (out_channels, in_channels / groups, kernel frames, kernel height, kernel width).
    bias:     (out_channels,) or None.
    stride, dilation: of frames, height and width, as of torch.nn.functional.conv3d.
    padding:  of height and width, with zeros.
    history:  the frames before x, (batch, in_channels, any number, height, width): the end of a
              stream's previous part, or `x[:, :, :1].expand(-1, -1, n, -1, -1)` for a first frame
              that repeats. Missing frames, with None all of them, count as zeros.
    y:        (batch, out_channels, (frames - 1) // stride + 1, new height, new width).

    Where `conv2d` runs a frame of the kernel by its own algorithm (on CPUs with AVX2 or AVX-512), y
    is the sum of such convolutions, one for each frame of the kernel, unless there is little to
    compute. x may have any strides, and the zeros before the first frame are not multiplied. y is
    then in channels_last_3d memory order or frame by frame, whatever that of x is, and a 16-bit y
    is rounded at each frame of the kernel. A single frame without history is one `conv2d` on every
    device. All else is torch's conv3d of a padded copy.

    Differentiable to any order.

    Raises TypeError or ValueError for a wrong dtype, shape or device.
    """
    _check(x, weight, bias, history)
    strides, dilations = _triple("stride", stride), _triple("dilation", dilation)
    how = strides[1:], padding, dilations[1:], groups
    if x.shape[2] == 1 and history is None:  # nothing but zeros before it
        return conv2d(x.squeeze(2), weight[:, :, -1], bias, *how).unsqueeze(2)
    own = x.device.type == "cpu" and are_faster() and kind_of(weight[:, :, -1], *how) is not None
    if own and len(x) and x[0].numel() * weight.shape[0] >= _LEAST:
        samples = x.transpose(1, 2)
        pasts = [None] * len(x) if history is None else history.transpose(1, 2)
        y = [
            _sum_over_taps(frames, weight, bias, past, strides[0], dilations[0], how)
            for frames, past in zip(samples, pasts, strict=True)
        ]
        frames = torch.cat(y) if len(y) > 1 else y[0]
        return frames.unflatten(0, (len(x), -1)).transpose(1, 2)
    missing = (weight.shape[2] - 1) * dilations[0]
    if history is not None:
        history = history[:, :, max(history.shape[2] - missing, 0) :]
        x, missing = torch.cat([history, x], 2), missing - history.shape[2]
    rows, columns = (padding, padding) if isinstance(padding, int) else padding
    x = F.pad(x, (0, 0, 0, 0, missing, 0))
    return F.conv3d(x, weight, bias, strides, (0, rows, columns), dilations, groups)


def _sum_over_taps(
    frames: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    stride: int,
    dilation: int,
    how: tuple,
) -> Tensor:
    """Of one sample, (frames, channels, height, width), and what came before it."""
    last, *earlier = reversed(weight.unbind(2))
    y = conv2d(frames[::stride], last, bias, *how)
    for reach, tap in zip(itertools.count(dilation, dilation), earlier, strict=False):
        # From this frame of y on the tap meets the sample.
        first = min(-(-reach // stride), y.shape[0])
        if first < y.shape[0]:
            met = frames[first * stride - reach :: stride][: y.shape[0] - first]
            y[first:] += conv2d(met, tap, None, *how)
        if past is not None:
            start = max(-((past.shape[0] - reach) // stride), 0)
            if start < first:
                met = past[past.shape[0] + start * stride - reach :: stride][: first - start]
                y[start:first] += conv2d(met, tap, None, *how)
    return y


def _triple(name: str, value: Triple) -> tuple[int, int, int]:
    values = (value, value, value) if isinstance(value, int) else tuple(value)
    if len(values) != 3 or any(type(v) is not int or v < 1 for v in values):
        raise ValueError(f"{name} must be a positive integer or three of them, got {value!r}")
    return values


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor | None) -> None:
    check_tensor("x", x, ndim=5)
    if x.shape[2] == 0:
        raise ValueError("x must have at least one frame, got none")
    like = None if under_autocast(x.device.type) else ("x", x)
    check_tensor("weight", weight, like=like, ndim=5)
    if bias is not None:
        check_tensor("bias", bias, like=like, shape=weight.shape[:1])
    if history is not None:
        batch, channels, _, *size = x.shape
        check_tensor("history", history, like=like, ndim=5)
        check_tensor("history", history, shape=(batch, channels, history.shape[2], *size))
