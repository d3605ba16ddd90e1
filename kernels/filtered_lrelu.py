"""Bias, upsampling filter, leaky ReLU, clamp, downsampling filter, and the derivative.

Not one kernel: upfirdn2d's twice, with the upsampled image in fp32 in memory, and between them one
that applies the activation in place and keeps two bits a pixel (negative, clamped), or reads them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .math import fp32
from .upfirdn2d import upfirdn2d

#: registers a thread and bytes of shared memory that a kernel may take; spills are never allowed
BUDGET = {"_activate": (48, 128), "_apply": (48, 0)}

_ROWS = 16
_WORD = tl.constexpr(32)


@triton.jit
def _words(size, width, words, ROWS: tl.constexpr):
    """ROWS words of the mask's rows of bits, each with its 32 pixels: where and whether."""
    word = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row, column = word // words, word % words * _WORD
    pixel = column[:, None] + tl.arange(0, _WORD)[None, :]
    inside = (word < size)[:, None] & (pixel < width)
    # A row's words for negative pixels stand before those for clamped ones.
    return word < size, row * 2 * words + word % words, row[:, None] * width + pixel, inside


@triton.jit
def _packed(bits):
    """Rows of 32 booleans as int32."""
    return tl.sum(bits.to(tl.int32) << tl.arange(0, _WORD)[None, :], 1)


@triton.jit
def _activate(
    z_ptr, mask_ptr, size, width, words, slope, limit, KEEP: tl.constexpr, ROWS: tl.constexpr
):
    fits, word, at, inside = _words(size, width, words, ROWS)
    z = tl.load(z_ptr + at, inside, 1.0)
    negative = z <= 0.0
    limit = fp32(limit)
    z = tl.where(negative, z * fp32(slope), z)
    clamped = tl.abs(z) > limit
    if KEEP:
        tl.store(mask_ptr + word, _packed(negative & inside), fits)
        tl.store(mask_ptr + word + words, _packed(clamped & inside), fits)
    z = tl.where(z > limit, limit, tl.where(z < -limit, -limit, z))  # keeps NaN
    tl.store(z_ptr + at, z, inside)


@triton.jit
def _apply(z_ptr, mask_ptr, size, width, words, slope, ROWS: tl.constexpr):
    fits, word, at, inside = _words(size, width, words, ROWS)
    lane = tl.arange(0, _WORD)[None, :]
    negative = (tl.load(mask_ptr + word, fits, 0)[:, None] >> lane) & 1
    clamped = (tl.load(mask_ptr + word + words, fits, 0)[:, None] >> lane) & 1
    z = tl.load(z_ptr + at, inside, 0.0)
    z = tl.where(negative != 0, z * fp32(slope), z)
    tl.store(z_ptr + at, tl.where(clamped != 0, 0.0, z), inside)


def _stages(x: Tensor, first, second, geometry, flip, gain, between) -> Tensor:
    up_x, up_y, down_x, down_y = geometry[:4]
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    z = x.float().contiguous()
    z = upfirdn2d(z, first, (up_x, up_y, 1, 1, *geometry[4:8]), flip, gain)
    words = triton.cdiv(z.shape[3], _WORD.value)
    between(z, z.numel() // z.shape[3] * words, z.shape[3], words)
    z = upfirdn2d(z, second, (1, 1, down_x, down_y, *geometry[8:12]), flip, 1.0)
    layout = torch.channels_last if last else torch.contiguous_format
    return z.to(x.dtype, memory_format=layout)


def filtered_lrelu(
    x, up_filter, down_filter, bias, geometry, flip, gain, slope, clamp, keep_mask
) -> tuple[Tensor, Tensor]:
    mask = x.new_empty(0, dtype=torch.int32)
    limit = float("inf") if clamp is None else float(clamp)

    def between(z, size, width, words):
        nonlocal mask
        if keep_mask:
            mask = x.new_empty((*z.shape[:3], 2, words), dtype=torch.int32)
        if size:
            _activate[(triton.cdiv(size, _ROWS),)](
                z, mask, size, width, words, float(slope), limit, KEEP=keep_mask, ROWS=_ROWS
            )

    biased = x if bias is None else x.float() + bias.float().view(1, -1, 1, 1)
    y = _stages(biased, up_filter, down_filter, (*geometry, 0, 0, 0, 0), flip, gain, between)
    return y.to(x.dtype), mask


def filtered_mask(x, mask, first, second, geometry, flip, gain, slope) -> Tensor:
    mask = mask.contiguous()

    def between(z, size, width, words):
        if size:
            grid = (triton.cdiv(size, _ROWS),)
            _apply[grid](z, mask, size, width, words, float(slope), ROWS=_ROWS)

    return _stages(x, first, second, geometry, flip, gain, between)
