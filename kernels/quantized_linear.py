"""y = x @ W.T + bias for W of 4- or 8-bit codes in tiles of 16 rows (ops/_quantized_format.py).

The weight is read as words of 32 bits: a word is one row's codes of a run of 8 columns (4 bits) or
4 columns (8 bits), and 16 rows of a run are 64 consecutive bytes. A run is never taken apart: part
j of all words, column j of every run, meets the same columns of x, and a sum over columns may be
taken in any order.

By count of bytes: a thread of the GEMV loads 32 bytes (8 rows of a run), a warp 1 KB, the codes of
four blocks of 4 bits in groups of 32, which lie 288 or 320 bytes apart with the scales (and
minimums) between them. So every 32-byte sector of the weight is fetched from memory once and used
in full; what is read again (the scales by each run of a group, x by each tile) is in the caches.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .math import INTERPRETED
from .optional import contiguous
from .rows import as_rows

#: registers a thread and bytes of shared memory that a kernel may take; spills are never allowed
BUDGET = {"_gemv": (176, 512), "_gemm": (160, 57856), "_arrange": (32, 2048)}

_TILE = tl.constexpr(16)


@triton.jit
def _centred(word, PART: tl.constexpr, BITS: tl.constexpr):
    """Codes of one column of each run, as fp32, less 2^(BITS - 1).

    The codes stay where they are in the word, under an exponent that makes their lowest bit one:
    an `and-or` and an addition instead of a shift, an `and`, a conversion and an addition."""
    SHIFT: tl.constexpr = 8 * PART if BITS == 8 else 8 * (PART % 4) + PART // 4 * 4
    HIGH: tl.constexpr = 16 if SHIFT + BITS > 23 else 0  # a mantissa has 23 bits
    AT: tl.constexpr = SHIFT - HIGH
    MASK: tl.constexpr = ((1 << BITS) - 1) << AT
    EXPONENT: tl.constexpr = (127 + 23 - AT) << 23
    raised = ((word >> HIGH) & MASK | EXPONENT).to(tl.float32, bitcast=True)
    return raised - ((1 << (23 - AT)) + (1 << (BITS - 1)))


@triton.jit
def _gemv(
    x_ptr, word_ptr, half_ptr, bias_ptr, y_ptr, in_features, out_features, groups,
    x_row, x_run, x_part,
    BITS: tl.constexpr, GROUP_RUNS: tl.constexpr, MINIMUM: tl.constexpr, ROWS: tl.constexpr,
    RUNS: tl.constexpr,
):  # fmt: skip
    """One tile for all ROWS rows of x, RUNS runs at a time; sums over runs wait for the end."""
    PARTS: tl.constexpr = 32 // BITS
    BLOCK: tl.constexpr = GROUP_RUNS * _TILE + (_TILE if MINIMUM else _TILE // 2)
    tile = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, _TILE)[None, :]
    word_ptr += tile * groups * BLOCK
    half_ptr += tile * groups * (2 * BLOCK) + 2 * GROUP_RUNS * _TILE
    sums = ()
    for _ in tl.static_range(ROWS):
        sums += (tl.zeros([RUNS, _TILE], tl.float32),)
    for start in range(0, groups * GROUP_RUNS, RUNS):
        run = start + tl.arange(0, RUNS)
        group = run // GROUP_RUNS
        mask = (run < groups * GROUP_RUNS)[:, None]
        at = (group * BLOCK + run % GROUP_RUNS * _TILE)[:, None] + lanes
        word = tl.load(word_ptr + at, mask, 0)
        half = half_ptr + (group * (2 * BLOCK))[:, None] + lanes
        scale = tl.load(half, mask, 0.0).to(tl.float32)
        middle = scale
        if MINIMUM:
            middle = tl.load(half + _TILE, mask, 0.0).to(tl.float32) + scale * (1 << (BITS - 1))
        new = ()
        for row in tl.static_range(ROWS):
            products = tl.zeros([RUNS, _TILE], tl.float32)
            total = tl.zeros([RUNS], tl.float32)
            for part in tl.static_range(PARTS):
                at_x = row * x_row + run.to(tl.int64) * x_run + part * x_part
                x = tl.load(x_ptr + at_x, run * PARTS + part < in_features, 0.0).to(tl.float32)
                products += _centred(word, part, BITS) * x[:, None]
                total += x
            if MINIMUM:
                products = products * scale + middle * total[:, None]
            else:
                products = products * scale
            new += (sums[row] + products,)
        sums = new
    column = tile * _TILE + tl.arange(0, _TILE)
    mask = column < out_features
    for row in tl.static_range(ROWS):
        y = tl.sum(sums[row], 0)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + column, mask, 0.0).to(tl.float32)
        y = y.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + tl.cast(row, tl.int64) * out_features + column, y, mask)


@triton.jit
def _gemm(
    x_ptr, word_ptr, half_ptr, bias_ptr, y_ptr, rows, in_features, out_features, groups, tiles,
    x_row, x_run, x_part,
    BITS: tl.constexpr, GROUP_RUNS: tl.constexpr, MINIMUM: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, RUNS: tl.constexpr, PADDED: tl.constexpr, IN_FP32: tl.constexpr,
):  # fmt: skip
    """ROWS x COLUMNS of y; the weight is rounded to the dtype of x, as the reference does."""
    PARTS: tl.constexpr = 32 // BITS
    BLOCK: tl.constexpr = GROUP_RUNS * _TILE + (_TILE if MINIMUM else _TILE // 2)
    row_blocks = tl.cdiv(rows, ROWS)
    # Programs of the same columns are neighbours: the weight comes from memory once.
    row = (tl.program_id(0) % row_blocks) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) // row_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    is_row, tile, lane = (row < rows)[:, None], column // _TILE, column % _TILE
    words = word_ptr + (tile.to(tl.int64) * groups * BLOCK + lane)[None, :]
    halves = half_ptr + (tile.to(tl.int64) * groups * (2 * BLOCK) + lane)[None, :]
    halves += 2 * GROUP_RUNS * _TILE
    result = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, groups * GROUP_RUNS, RUNS):
        run = start + tl.arange(0, RUNS)
        group = run // GROUP_RUNS
        mask = (run < groups * GROUP_RUNS)[:, None] & (tile < tiles)[None, :]
        word = tl.load(words + (group * BLOCK + run % GROUP_RUNS * _TILE)[:, None], mask, 0)
        half = halves + (group * (2 * BLOCK))[:, None]
        scale = tl.load(half, mask, 0.0).to(tl.float32)
        middle = scale
        if MINIMUM:
            middle = tl.load(half + _TILE, mask, 0.0).to(tl.float32) + scale * (1 << (BITS - 1))
        for part in tl.static_range(PARTS):
            # Without a mask of columns the loads are of 16 bytes.
            x_mask = is_row if PADDED else is_row & (run * PARTS + part < in_features)[None, :]
            weight = _centred(word, part, BITS) * scale
            if MINIMUM:
                weight += middle
            x = tl.load(
                x_ptr + row.to(tl.int64)[:, None] * x_row + part * x_part
                + (run.to(tl.int64) * x_run)[None, :],
                x_mask, 0.0,
            )  # fmt: skip
            if IN_FP32:
                x = x.to(tl.float32)
            result = tl.dot(x, weight.to(x.dtype), result, input_precision="ieee")
    is_column = column < out_features
    if bias_ptr is not None:
        result += tl.load(bias_ptr + column, is_column, 0.0).to(tl.float32)[None, :]
    at = row.to(tl.int64)[:, None] * out_features + column[None, :]
    tl.store(y_ptr + at, result.to(y_ptr.dtype.element_ty), is_row & is_column[None, :])


@triton.jit
def _arrange(
    x_ptr, out_ptr, in_features, x_stride, out_row, out_part, group_size,
    PARTS: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x (rows, columns) as (part, rows, run), and rounded to 255 steps a group if ROUND."""
    row, begin = tl.program_id(0).to(tl.int64), tl.program_id(1) * group_size
    end = tl.minimum(begin + group_size, in_features)
    x_ptr += row * x_stride
    top = 0.0
    if ROUND:
        tops = tl.zeros([BLOCK], tl.float32)
        for start in range(begin, end, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + column, column < end, 0.0).to(tl.float32)
            tops = tl.maximum(tops, tl.abs(x))
        top = tl.max(tops, 0)
    # Where 127 / top would pass the largest fp32 the reference gives zeros, and so does 127 / inf.
    factor = tl.div_rn(127.0, tl.where(top > 3.7323e-37, top, float("inf")))
    step = tl.div_rn(top, 127.0)
    for start in range(begin, end, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + column, column < end, 0.0).to(tl.float32)
        if ROUND:
            # Past 1.5 * 2^23 fp32 has integers alone: rounds to the nearest, ties to even.
            x = ((x * factor + 12582912.0) - 12582912.0) * step
        at = column % PARTS * out_part.to(tl.int64) + row * out_row + column // PARTS
        tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), column < end)


# ---- launcher ---------------------------------------------------------------------------------


def _arranged(x: Tensor, parts: int, group_size: int, rounded: bool) -> Tensor:
    """(parts, rows, runs): column j of every run, runs padded with zeros to a multiple of 32."""
    rows, columns = x.shape
    dtype = torch.float32 if INTERPRETED else x.dtype
    out = x.new_zeros((parts, rows, triton.cdiv(columns, 32 * parts) * 32), dtype=dtype)
    width = group_size if rounded else 1024
    block = min(triton.next_power_of_2(width), 1024)
    _arrange[(rows, triton.cdiv(columns, width))](
        x, out, columns, x.stride(0), out.stride(1), out.stride(0), width,
        PARTS=parts, ROUND=rounded, BLOCK=block, num_warps=max(1, block // 256),
    )  # fmt: skip
    return out


def quantized_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, bits: int, group_size: int, out_features: int,
    quantize_activations: bool,
) -> Tensor:  # fmt: skip
    y = x.new_empty((*x.shape[:-1], out_features))
    if not y.numel():
        return y
    x, weight = as_rows(x), weight.contiguous()
    if weight.data_ptr() % 16:  # of a tensor that starts anywhere
        weight = weight.clone()
    rows, in_features = x.shape
    tiles, groups, _ = weight.shape
    parts = 32 // bits
    group_runs = group_size // parts
    # A row costs the GEMV an operation a weight beside the two or three of taking it from its
    # word; the GEMM about five a weight, fp32 16 more, for it has no tensor cores. (Counted, not
    # timed.)
    wide = x.dtype == torch.float32
    few = rows <= (8 if wide else 4)
    strides = x.stride(0), parts, 1
    arranged = quantize_activations or rows > 16
    if arranged:
        x = _arranged(x, parts, group_size, quantize_activations)
        strides = x.stride(1), 1, x.stride(0)
    constants = {
        "BITS": bits,
        "GROUP_RUNS": group_runs,
        "MINIMUM": weight.shape[2] == 16 * (4 * group_runs + 4),
    }
    matrices = x, weight.view(torch.int32), weight.view(torch.float16), *contiguous(bias), y
    if few:
        warps = min(max(triton.next_power_of_2(groups * group_runs // 16), 1), 8)
        _gemv[(tiles,)](
            *matrices, in_features, out_features, groups, *strides, **constants,
            ROWS=rows, RUNS=warps * (16 if rows < 4 else 8), num_warps=warps,
        )  # fmt: skip
        return y
    ROWS = min(max(triton.next_power_of_2(rows), 16), 32 if wide else 64)
    COLUMNS = 32 if rows <= 16 or wide else 64
    grid = (triton.cdiv(rows, ROWS) * triton.cdiv(16 * tiles, COLUMNS),)
    # Left to itself, ptxas spills some 16 bytes of sm_100's to get down to 96 registers.
    _gemm[grid](
        *matrices, rows, in_features, out_features, groups, tiles, *strides, **constants,
        ROWS=ROWS, COLUMNS=COLUMNS, RUNS=16, PADDED=arranged, IN_FP32=INTERPRETED,
        num_warps=4, num_stages=2, maxnreg=255,
    )  # fmt: skip
    return y
