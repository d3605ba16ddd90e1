"""Rotary position embedding. One program turns HEADS heads of one token, which share the angles;
x may have any strides outside of a head."""

import triton
import triton.language as tl
from torch import Tensor

from .memory_order import contiguous_like
from .rows import with_dense_rows

#: registers a thread and bytes of shared memory that a kernel may take; spills are never allowed
BUDGET = {"_rotate": (48, 2048)}

_TILE = 2048


@triton.jit
def load_pairs(
    ptr, is_row, half, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr
):
    """The first and the second, in fp32, of each pair that turns: (ROWS, HALF) both.

    Interleaved, they are read side by side and then parted: of loads of every other element
    triton 3.6 gives a warp two columns of 16 rows.
    """
    if INTERLEAVED:
        j = tl.arange(0, 2 * HALF)[None, :]
        x = tl.load(ptr + j, is_row & (j < 2 * half), 0.0).to(tl.float32)
        return tl.split(tl.reshape(x, (ROWS, HALF, 2)))
    else:
        i = tl.arange(0, HALF)[None, :]
        mask = is_row & (i < half)
        first = tl.load(ptr + i, mask, 0.0).to(tl.float32)
        return first, tl.load(ptr + half + i, mask, 0.0).to(tl.float32)


@triton.jit
def store_pairs(
    ptr, first, second, is_row, half, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """The reverse of `load_pairs`, in the pointer's dtype."""
    dtype = ptr.dtype.element_ty
    if INTERLEAVED:
        j = tl.arange(0, 2 * HALF)[None, :]
        x = tl.reshape(tl.join(first, second), (ROWS, 2 * HALF))
        tl.store(ptr + j, x.to(dtype), is_row & (j < 2 * half))
    else:
        i = tl.arange(0, HALF)[None, :]
        mask = is_row & (i < half)
        tl.store(ptr + i, first.to(dtype), mask)
        tl.store(ptr + half + i, second.to(dtype), mask)


@triton.jit
def _rotate(
    x_ptr, cos_ptr, sin_ptr, y_ptr, seq, heads, head_dim, half,
    x_batch, x_token, x_head, cos_batch, cos_token, sin_batch, sin_token,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
    REST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    batch, position = token // seq, token % seq
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    in_heads = head < heads
    x_ptr += batch * x_batch + position * x_token + head.to(tl.int64) * x_head
    y_ptr += (token * heads + head) * head_dim
    i = tl.arange(0, HALF)[None, :]
    at = cos_ptr + batch * cos_batch + position * cos_token + i
    cos = tl.load(at, i < half, 0.0).to(tl.float32)
    at = sin_ptr + batch * sin_batch + position * sin_token + i
    sin = tl.load(at, i < half, 0.0).to(tl.float32)
    if INVERSE:
        sin = -sin
    a, b = load_pairs(x_ptr, in_heads, half, INTERLEAVED, HEADS, HALF)
    store_pairs(
        y_ptr, a * cos - b * sin, b * cos + a * sin, in_heads, half, INTERLEAVED, HEADS, HALF
    )
    if REST:
        j = 2 * half + tl.arange(0, REST)[None, :]
        mask = in_heads & (j < head_dim)
        tl.store(y_ptr + j, tl.load(x_ptr + j, mask), mask)


def angle_strides(*tables: Tensor) -> tuple[int, ...]:
    """Of each table from sequence to sequence and from token to token."""
    both = ((t.stride(0) if t.dim() == 3 else 0, t.stride(-2)) for t in tables)
    return tuple(stride for pair in both for stride in pair)


def apply_rotary(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, inverse: bool = False
) -> Tensor:
    y = contiguous_like(x)
    if not y.numel():
        return y
    x, cos, sin = with_dense_rows(x), with_dense_rows(cos), with_dense_rows(sin)
    batch, seq, heads, head_dim = x.shape
    half = cos.shape[-1]
    rest = head_dim - 2 * half
    HALF = triton.next_power_of_2(max(half, 1))
    HEADS = min(triton.next_power_of_2(heads), max(1, _TILE // (2 * HALF)))
    grid = (batch * seq, triton.cdiv(heads, HEADS))
    _rotate[grid](x, cos, sin, y, seq, heads, head_dim, half, *x.stride()[:3],
                  *angle_strides(cos, sin), INTERLEAVED=interleaved, INVERSE=inverse, HEADS=HEADS,
                  HALF=HALF, REST=triton.next_power_of_2(rest) if rest else 0)  # fmt: skip
    return y
