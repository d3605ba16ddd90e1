"""Classifier-free guidance inside other kernels, and the factors of its rescaling.

m = uncond + scale * (cond - uncond) is multiplied, for each sample, with
rescale * std(cond) / std(m) + 1 - rescale. Deviations are taken from the mean, block by block, and
the blocks are added up in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .math import fp32
from .per_sample import BLOCK, Rows, locate
from .rows import load

#: registers a thread and bytes of shared memory that a kernel may take; spills are never allowed
BUDGET = {"_moments": (48, 1024), "_factors": (48, 1024)}

#: blocks that the program of one sample adds up at a time
_LENGTH = 256


@triton.jit
def guided_output(output_ptr, uncond_ptr, row, output_stride, uncond_stride, at, mask, scale):
    m = load(output_ptr, row, output_stride, at, mask)
    if uncond_ptr is not None:
        u = load(uncond_ptr, row, uncond_stride, at, mask)
        m = u + scale * (m - u)
    return m


@triton.jit
def _block_moments(x, mask, count):
    """Mean and sum of squared deviations; x is 0 outside the mask."""
    mean = tl.sum(x, 0) / count
    d = tl.where(mask, x - mean, 0.0)
    return mean, tl.sum(d * d, 0)


@triton.jit
def _moments(
    output_ptr, uncond_ptr, moments_ptr, inner, output_stride, uncond_stride, scale,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """(mean, squares) of the conditional and of the guided output, for each block."""
    row, at, mask = locate(inner, BLOCK)
    c = load(output_ptr, row, output_stride, at, mask)
    scale = fp32(scale)
    g = guided_output(output_ptr, uncond_ptr, row, output_stride, uncond_stride, at, mask, scale)
    count = tl.sum(mask.to(tl.float32), 0)
    out = moments_ptr + tl.program_id(0).to(tl.int64) * 4
    mean, squares = _block_moments(c, mask, count)
    tl.store(out, mean)
    tl.store(out + 1, squares)
    mean, squares = _block_moments(g, mask, count)
    tl.store(out + 2, mean)
    tl.store(out + 3, squares)


@triton.jit
def _block(moments_ptr, start, blocks, inner, LENGTH: tl.constexpr, BLOCK: tl.constexpr):
    """Element counts, means and squares of LENGTH blocks of one sample."""
    block = start + tl.arange(0, LENGTH)
    live = block < blocks
    count = tl.where(live, tl.minimum(inner - block * BLOCK, BLOCK), 0).to(tl.float32)
    mean = tl.load(moments_ptr + block * 4, live, 0.0)
    return count, mean, tl.load(moments_ptr + block * 4 + 1, live, 0.0)


@triton.jit
def _total(moments_ptr, inner, LENGTH: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of squared deviations of a sample from those of its blocks."""
    blocks = tl.cdiv(inner, BLOCK)
    total = tl.zeros((LENGTH,), tl.float32)
    for start in range(0, blocks, LENGTH):
        count, mean, _ = _block(moments_ptr, start, blocks, inner, LENGTH, BLOCK)
        total += mean * count
    center = tl.sum(total, 0) / inner
    total = tl.zeros((LENGTH,), tl.float32)
    for start in range(0, blocks, LENGTH):
        count, mean, squares = _block(moments_ptr, start, blocks, inner, LENGTH, BLOCK)
        d = mean - center
        total += squares + count * d * d
    return tl.sum(total, 0)


@triton.jit
def _factors(moments_ptr, factors_ptr, inner, rescale, LENGTH: tl.constexpr, BLOCK: tl.constexpr):
    """One program adds up one sample."""
    row = tl.program_id(0).to(tl.int64)
    moments_ptr += row * tl.cdiv(inner, BLOCK) * 4
    cond = _total(moments_ptr, inner, LENGTH, BLOCK)
    guided = _total(moments_ptr + 2, inner, LENGTH, BLOCK)
    rescale = fp32(rescale)
    tl.store(factors_ptr + row, rescale * tl.sqrt(cond / guided) + 1.0 - rescale)


def rescale_factors(
    rows: Rows, output: Tensor, uncond: Tensor, strides: list[int], scale: float, rescale: float
) -> Tensor:
    moments = output.new_empty((*rows.grid, 4), dtype=torch.float32)
    factors = output.new_empty(rows.batch, dtype=torch.float32)
    _moments[rows.grid](output, uncond, moments, rows.inner, *strides, float(scale), BLOCK=BLOCK)
    _factors[(rows.batch,)](
        moments, factors, rows.inner, float(rescale), LENGTH=_LENGTH, BLOCK=BLOCK
    )
    return factors
