"""Tiles of a dense tensor that is normalised: what norm_act and its derivatives share.

A norm is what shares a mean and a variance: a channel of the batch, a channel of a sample, or a
pixel. Seen in memory order as (samples, rows, channels, inner) the tensor has a norm for each
(sample, channel). A program takes a tile of ELEMENTS x CHANNELS: one norm where its elements are
neighbours and fill it, several where they do not or where the channels are neighbours (INNERMOST).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .channel_tiles import ordered
from .memory_order import dense
from .optional import value_or

_TILE = 1024
_PROGRAMS = 1024  # of a sum: about eight for each SM of the largest GPUs
#: what the statistics are of: none are computed, or each channel, channel of a sample, or pixel
GIVEN, BATCH, SAMPLE, PIXEL = range(4)


@triton.jit
def place(samples, channels, CHANNELS: tl.constexpr):
    """This program's sample, channels and number along a norm."""
    across = tl.cdiv(channels, CHANNELS)
    pid = tl.program_id(0).to(tl.int64)
    unit = pid % (samples * across)
    channel = unit % across * CHANNELS + tl.arange(0, CHANNELS)
    return unit // across, channel, pid // (samples * across)


@triton.jit
def offsets(sample, element, last, channel, rows, channels, inner, INNERMOST: tl.constexpr):
    """Offsets and mask of a tile."""
    e, c = element[:, None], channel[None, :]
    if INNERMOST:
        at = (sample * rows + e) * channels + c
    else:
        at = ((sample * rows + e // inner) * channels + c) * inner + e % inner
    return at, (e < last) & (c < channels)


@triton.jit
def centred(x_ptr, at, mask, mean_ptr, norm, known):
    x = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
    return x - value_or(mean_ptr, norm, known, 0.0)[None, :]


@triton.jit
def affine(x, rstd_ptr, weight_ptr, bias_ptr, norm, known):
    """(weight / deviation, that * x + bias)"""
    scale = value_or(rstd_ptr, norm, known, 1.0) * value_or(weight_ptr, norm, known, 1.0)
    return scale[None, :], x * scale[None, :] + value_or(bias_ptr, norm, known, 0.0)[None, :]


@triton.jit
def store_part(ptr, k, sums, part, parts, norm, norms, known):
    """A part of sum k, the tile's lanes joined in fp64: ptr is (sums, parts, norms)."""
    at = ptr + (k * parts + part).to(tl.int64) * norms + norm
    tl.store(at, tl.sum(sums.to(tl.float64), 0), known)


@triton.jit
def total(ptr, k, norm, norms, parts, PARTS: tl.constexpr):
    p = tl.arange(0, PARTS)[:, None]
    mask = (p < parts) & (norm < norms)[None, :]
    return tl.sum(tl.load(ptr + (k * parts + p).to(tl.int64) * norms + norm[None, :], mask, 0.0), 0)


@triton.jit
def store_value(ptr, k, v, norm, norms):
    if ptr is not None:
        tl.store(
            ptr + tl.cast(k, tl.int64) * norms + norm,
            v.to(tl.float32).to(ptr.dtype.element_ty),
            norm < norms,
        )


# ---- launchers ------------------------------------------------------------------------------


def in_layout(x: Tensor, statistics: int) -> Tensor:
    return dense(x) if statistics <= BATCH else ordered(x)


class Tiling:
    """How a dense tensor is cut into tiles, and its norms into parts; the shape alone decides."""

    def __init__(self, x: Tensor, statistics: int) -> None:
        samples, channels, positions = x.shape[0], x.shape[1], x.shape[2:].numel()
        innermost = positions == 1 or not x.is_contiguous()
        if statistics <= BATCH:
            inner = x.stride(1) if channels > 1 else x.numel()
            view = (1, x.numel() // (channels * inner), channels, inner)
        elif statistics == SAMPLE:
            view = (samples, positions, channels, 1) if innermost else (1, 1, samples * channels, positions)  # noqa: E501  # fmt: skip
        else:
            view = (1, 1, samples * positions, channels) if innermost else (samples, channels, positions, 1)  # noqa: E501  # fmt: skip
        samples, rows, channels, inner = view
        self.count, self.norms = rows * inner, samples * channels
        self.view = (*view, self.count)
        # Several norms where the channels are neighbours, or where one alone would fill no tile.
        most = 64 if inner == 1 else max(1, _TILE // triton.next_power_of_2(self.count))
        across = min(triton.next_power_of_2(channels), most)
        down = min(triton.next_power_of_2(self.count), _TILE // across)
        self.tile = {"INNERMOST": inner == 1, "ELEMENTS": down, "CHANNELS": across}
        units, tiles = samples * triton.cdiv(channels, across), triton.cdiv(self.count, down)
        self.grid = (units * tiles,)
        most = max(1, min(_PROGRAMS // units, tiles))
        self.part = triton.cdiv(triton.cdiv(self.count, most), down) * down
        self.parts = triton.cdiv(self.count, self.part)
        self.sum_grid = (units * self.parts,)
        parts = triton.next_power_of_2(self.parts)
        own = max(1, min(triton.next_power_of_2(self.norms), 1024 // parts))
        self.values = {"PARTS": parts, "NORMS": own}
        self.value_grid = (triton.cdiv(self.norms, own),)
        self.share = 0.0 if statistics == GIVEN else 1.0 / self.count
        self.mean_share = 0.0 if statistics == PIXEL else self.share

    def new(self, x: Tensor, *shape: int) -> Tensor:
        return x.new_empty(*shape, self.norms, dtype=torch.float32)

    def new_sums(self, x: Tensor, number: int) -> Tensor:
        return x.new_empty(number, self.parts, self.norms, dtype=torch.float64)


def rstd_of(var: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(var.float() + eps)


def gradient_of(parameter: Tensor | None) -> Tensor | None:
    """Zeros: an empty x has no tile that would write the sums."""
    return None if parameter is None else parameter.new_zeros(parameter.shape)
