"""Appends to caches of keys and values. One program writes HEADS heads of one token, unless they
would land outside the caches: as they are, or turned, scaled and rounded on the way."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .narrow import NARROW, narrow
from .optional import contiguous
from .rotary import angle_strides
from .rows import with_dense_rows

#: registers a thread and bytes of shared memory that a kernel may take; spills are never allowed
BUDGET = {"_append": (40, 0)}

_TILE = 2048


@triton.jit
def _put(to_ptr, x, factor, mask, CACHE: tl.constexpr):
    """Stores the fp32 numbers x * factor."""
    if CACHE is None:
        tl.store(to_ptr, (x * factor).to(to_ptr.dtype.element_ty), mask)
    else:
        tl.store(to_ptr, narrow(x * factor, CACHE), mask)


@triton.jit
def _move(from_ptr, to_ptr, factor, mask, CACHE: tl.constexpr, AS_IS: tl.constexpr):
    x = tl.load(from_ptr, mask)
    if AS_IS:
        tl.store(to_ptr, x, mask)
    else:
        _put(to_ptr, x.to(tl.float32), factor, mask, CACHE)


@triton.jit
def _factor(scale_ptr, head, heads):
    """1 / scale of each head."""
    if scale_ptr is None:
        factor = tl.full([head.shape[0], 1], 1.0, tl.float32)
    else:
        factor = tl.div_rn(1.0, tl.load(scale_ptr + head, head < heads, 1.0).to(tl.float32))
    return factor


@triton.jit
def _append(
    key_ptr, value_ptr, key_cache_ptr, value_cache_ptr, positions_ptr, table_ptr, cos_ptr, sin_ptr,
    key_scale_ptr, value_scale_ptr,
    q_len, capacity, heads, head_dim, half, num_pages, page_size,
    position_stride, table_batch, table_page, cos_batch, cos_token, sin_batch, sin_token,
    k0, k1, k2, k3, v0, v1, v2, v3, kc0, kc1, kc2, kc3, vc0, vc1, vc2, vc3,
    INTERLEAVED: tl.constexpr, CACHE: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64) // q_len
    token = tl.program_id(0).to(tl.int64) % q_len
    entry = tl.load(positions_ptr + batch * position_stride).to(tl.int64) + token
    head = (tl.program_id(1).to(tl.int64) * HEADS + tl.arange(0, HEADS))[:, None]
    # A token outside the caches has no heads (the interpreter cannot splat a boolean).
    num_heads = tl.where((entry >= 0) & (entry < capacity), heads, 0)
    row, slot = batch, entry
    if table_ptr is not None:
        entry = tl.minimum(tl.maximum(entry, 0), capacity - 1)
        row = tl.load(table_ptr + batch * table_batch + entry // page_size * table_page)
        row = row.to(tl.int64)
        slot = entry % page_size
        num_heads = tl.where((row >= 0) & (row < num_pages), num_heads, 0)
    is_head = head < num_heads

    value_ptr += batch * v0 + token * v1 + head * v2
    value_cache_ptr += row * vc0 + slot * vc1 + head * vc2
    d = tl.arange(0, DIM).to(tl.int64)[None, :]
    factor = _factor(value_scale_ptr, head, heads)
    as_is: tl.constexpr = value_scale_ptr is None and CACHE is None
    mask = is_head & (d < head_dim)
    _move(value_ptr + d * v3, value_cache_ptr + d * vc3, factor, mask, CACHE, as_is)

    key_ptr += batch * k0 + token * k1 + head * k2
    key_cache_ptr += row * kc0 + slot * kc1 + head * kc2
    factor = _factor(key_scale_ptr, head, heads)
    if cos_ptr is not None:
        i = tl.arange(0, HALF).to(tl.int64)[None, :]
        cos = tl.load(cos_ptr + batch * cos_batch + token * cos_token + i, i < half, 0.0)
        sin = tl.load(sin_ptr + batch * sin_batch + token * sin_token + i, i < half, 0.0)
        cos, sin = cos.to(tl.float32), sin.to(tl.float32)
        first, second = (2 * i, 2 * i + 1) if INTERLEAVED else (i, half + i)
        mask = is_head & (i < half)
        a = tl.load(key_ptr + first * k3, mask, 0.0).to(tl.float32)
        b = tl.load(key_ptr + second * k3, mask, 0.0).to(tl.float32)
        _put(key_cache_ptr + first * kc3, a * cos - b * sin, factor, mask, CACHE)
        _put(key_cache_ptr + second * kc3, b * cos + a * sin, factor, mask, CACHE)
    if REST:
        d = 2 * half + tl.arange(0, REST).to(tl.int64)[None, :]
        as_is_key: tl.constexpr = key_scale_ptr is None and CACHE is None
        mask = is_head & (d < head_dim)
        _move(key_ptr + d * k3, key_cache_ptr + d * kc3, factor, mask, CACHE, as_is_key)


def append_kv(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, positions: Tensor
) -> None:
    append_kv_full(
        key, value, key_cache, value_cache, positions, None, None, None, False, None, None
    )


def append_kv_full(
    key, value, key_cache, value_cache, positions, block_table, cos, sin, interleaved, key_scale,
    value_scale,
) -> None:  # fmt: skip
    if not key.numel():
        return
    batch, q_len, heads, head_dim = key.shape
    num_pages, page_size = key_cache.shape[:2]
    capacity = page_size if block_table is None else block_table.shape[1] * page_size
    kind = NARROW.get(key_cache.dtype)
    if kind:
        key_cache, value_cache = key_cache.view(torch.int8), value_cache.view(torch.int8)
    half, strides = 0, (0, 0, 0, 0)
    if cos is not None:
        half = cos.shape[-1]
        cos, sin = with_dense_rows(cos), with_dense_rows(sin)
        strides = angle_strides(cos, sin)
    key_scale, value_scale = contiguous(key_scale, value_scale)
    rest = head_dim - 2 * half
    DIM = triton.next_power_of_2(head_dim)
    HEADS = min(triton.next_power_of_2(heads), max(1, _TILE // DIM))
    _append[(batch * q_len, triton.cdiv(heads, HEADS))](
        key, value, key_cache, value_cache, positions, block_table, cos, sin, key_scale,
        value_scale, q_len, capacity, heads, head_dim, half, num_pages, page_size,
        positions.stride(0), *((0, 0) if block_table is None else block_table.stride()),
        *strides, *key.stride(), *value.stride(), *key_cache.stride(),
        *value_cache.stride(), INTERLEAVED=interleaved, CACHE=kind, HEADS=HEADS, DIM=DIM,
        HALF=triton.next_power_of_2(max(half, 1)), REST=triton.next_power_of_2(rest) if rest else 0,
    )  # fmt: skip
