"""The nearest code of every vector, and the derivative of their squared distance.

A program takes ROWS vectors and meets the codes tile by tile, CODES of them in a product on the
tensor cores (fp32 in full precision), and keeps the best score x.e - |e|^2 / 2 of every vector. Of
the codebook's gradient a program takes one code and the vectors that chose it, which a stable sort
has put side by side: no atomics, the same bits in every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .math import INTERPRETED, fp32
from .optional import contiguous

#: registers a thread and bytes of shared memory that a kernel may take; spills are never allowed
BUDGET = {"_forward": (184, 32768), "_backward": (40, 0), "_codes": (48, 1024)}

_ELEMENTS = 1024  # of a tile of vectors that have one code


@triton.jit
def _at(row, inner, stride):
    """Where the first feature of a vector lies in (outer, dim, inner), stride being dim * inner:
    a product that is not for the kernel, whose arguments have 32 bits."""
    return row // inner * stride + row % inner


@triton.jit
def _forward(
    x_ptr, codebook_ptr, start_ptr, quantized_ptr, distance_ptr, index_ptr, rows, codes, dim,
    inner, stride, IN_FP32: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr,
    FEATURES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row < rows
    at = _at(row, inner, stride)
    features, within = tl.arange(0, FEATURES), tl.arange(0, CODES)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    index = tl.zeros([ROWS], tl.int32)
    tile_ptr = codebook_ptr
    for first in range(0, codes, CODES):
        code = first + within
        start = tl.load(start_ptr + code, code < codes, float("-inf"))
        scores = tl.zeros([ROWS, CODES], tl.float32) + start[None, :]
        for d in range(0, dim, FEATURES):
            feature = d + features
            x = tl.load(
                x_ptr + at[:, None] + feature[None, :].to(tl.int64) * inner,
                is_row[:, None] & (feature < dim)[None, :], 0.0,
            )  # fmt: skip
            e = tl.load(
                tile_ptr + within[None, :] * dim + feature[:, None],
                (code < codes)[None, :] & (feature < dim)[:, None], 0.0,
            )  # fmt: skip
            if IN_FP32:
                x, e = x.to(tl.float32), e.to(tl.float32)
            scores = tl.dot(x, e, scores, input_precision="ieee")
        # A score that is NaN is never the better one.
        scores = tl.where(scores == scores, scores, float("-inf"))
        top = tl.max(scores, 1)
        # Of equal scores the lowest number.
        where = tl.min(tl.where(scores == top[:, None], code[None, :], 2147483647), 1)
        index = tl.where(top > best, where, index)
        best = tl.maximum(top, best)
        tile_ptr += CODES * dim
    tl.store(index_ptr + row, index.to(tl.int64), is_row)
    distance = tl.zeros([ROWS], tl.float32)
    for d in range(0, dim, FEATURES):
        feature = d + features
        mask = is_row[:, None] & (feature < dim)[None, :]
        e = tl.load(codebook_ptr + index[:, None].to(tl.int64) * dim + feature[None, :], mask, 0.0)
        place = at[:, None] + feature[None, :].to(tl.int64) * inner
        off = tl.load(x_ptr + place, mask, 0.0).to(tl.float32) - e.to(tl.float32)
        distance += tl.sum(off * off, 1)
        tl.store(quantized_ptr + place, e, mask)
    tl.store(distance_ptr + row, distance, is_row)


@triton.jit
def _backward(
    grad_ptr, passed_ptr, x_ptr, codebook_ptr, index_ptr, dx_ptr, size, dim, inner, stride,
    beta, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = grad_quantized + 2 beta grad_distances (x - code), in the order of x's memory."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    feature = place // inner % dim
    row = place // stride * inner + place % inner
    code = tl.load(index_ptr + row, mask, 0)
    e = tl.load(codebook_ptr + code * dim + feature, mask, 0.0).to(tl.float32)
    off = tl.load(x_ptr + place, mask, 0.0).to(tl.float32) - e
    dx = 2.0 * fp32(beta) * tl.load(grad_ptr + row, mask, 0.0) * off
    if passed_ptr is not None:
        dx += tl.load(passed_ptr + place, mask, 0.0).to(tl.float32)
    tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask)


@triton.jit
def _codes(
    grad_ptr, x_ptr, codebook_ptr, order_ptr, start_ptr, out_ptr, dim, inner, stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one code the sum of 2 grad_distances (code - x) over its vectors or, without
    grad_distances, of x."""
    code = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_feature = feature < dim
    if grad_ptr is not None:
        e = tl.load(codebook_ptr + code * dim + feature, is_feature, 0.0).to(tl.float32)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    end = tl.load(start_ptr + code + 1)
    for first in range(tl.load(start_ptr + code), end, ROWS):
        n = first + tl.arange(0, ROWS)
        row = tl.load(order_ptr + n, n < end, 0)
        place = _at(row, inner, stride)[:, None] + feature[None, :].to(tl.int64) * inner
        mask = (n < end)[:, None] & is_feature[None, :]
        x = tl.load(x_ptr + place, mask, 0.0).to(tl.float32)
        if grad_ptr is not None:
            x = 2.0 * tl.load(grad_ptr + row, n < end, 0.0)[:, None] * (e[None, :] - x)
        total += tl.where(mask, x, 0.0)
    result = tl.sum(total, 0)
    tl.store(out_ptr + code * dim + feature, result.to(out_ptr.dtype.element_ty), is_feature)


# ---- launchers ------------------------------------------------------------------------------


def vector_quantize(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, codebook = x.contiguous(), codebook.contiguous()
    outer, dim, inner = x.shape
    quantized = torch.empty_like(x)
    distances = x.new_empty((outer, inner), dtype=torch.float32)
    indices = x.new_empty((outer, inner), dtype=torch.int64)
    rows, codes = outer * inner, len(codebook)
    if rows:
        starts = codebook.float().square().sum(-1) * -0.5
        # In full precision fp32 has no tensor cores: larger tiles would spill.
        side, step = (32, 16) if x.dtype == torch.float32 else (64, 64)
        tile_rows = side if rows > 32 else 16
        tile_codes = min(side, max(16, triton.next_power_of_2(codes)))
        features = min(step, max(16, triton.next_power_of_2(dim)))
        _forward[(triton.cdiv(rows, tile_rows),)](
            x, codebook, starts, quantized, distances, indices, rows, codes, dim, inner,
            dim * inner, IN_FP32=INTERPRETED, ROWS=tile_rows, CODES=tile_codes, FEATURES=features,
            num_warps=8,
        )  # fmt: skip
    return quantized, distances, indices


def vector_quantize_backward(
    grad_distances: Tensor,
    grad_quantized: Tensor | None,
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    beta: float,
    codebook_grad: bool,
) -> tuple[Tensor, Tensor]:
    x, codebook, indices = x.contiguous(), codebook.contiguous(), indices.contiguous()
    grad = grad_distances.contiguous()
    _, dim, inner = x.shape
    dx = torch.empty_like(x)
    if x.numel():
        block = min(1024, triton.next_power_of_2(x.numel()))
        _backward[(triton.cdiv(x.numel(), block),)](
            grad, *contiguous(grad_quantized), x, codebook, indices, dx, x.numel(), dim, inner,
            dim * inner, float(beta), BLOCK=block,
        )  # fmt: skip
    dcodebook = torch.empty_like(codebook if codebook_grad else codebook[:0])
    if codebook_grad:
        _sum_codes(grad, x, codebook, indices, dcodebook)
    return dx, dcodebook


def codebook_moments(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    sums = x.new_empty((num_codes, x.shape[1]), dtype=torch.float32)
    starts = _sum_codes(None, x.contiguous(), None, indices, sums)
    return starts.diff(), sums


def _sum_codes(
    grad: Tensor | None, x: Tensor, codebook: Tensor | None, indices: Tensor, out: Tensor
) -> Tensor:
    """Where the vectors of each code start, and the end, in the order of the codes."""
    _, dim, inner = x.shape
    chosen, order = indices.flatten().sort(stable=True)
    starts = torch.searchsorted(chosen, torch.arange(len(out) + 1, device=x.device))
    block = min(256, triton.next_power_of_2(dim))
    _codes[(len(out), triton.cdiv(dim, block))](
        grad, x, codebook, order, starts, out, dim, inner, dim * inner,
        ROWS=max(1, min(16, _ELEMENTS // block)), BLOCK=block,
    )  # fmt: skip
    return starts
