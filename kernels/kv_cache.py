"""Appends to caches of keys and values. One program copies HEADS heads of one token, unless they
would land outside the cache."""

import triton
import triton.language as tl
from torch import Tensor

#: registers a thread and bytes of shared memory that a kernel may take; spills are never allowed
BUDGET = {"_append": (40, 0)}

_TILE = 2048


@triton.jit
def _copy(
    from_ptr, to_ptr, batch, token, row, slot, head, d, mask,
    from_batch, from_token, from_head, from_d, to_row, to_slot, to_head, to_d,
):  # fmt: skip
    at = from_ptr + batch * from_batch + token * from_token + head * from_head + d * from_d
    x = tl.load(at, mask)
    tl.store(to_ptr + row * to_row + slot * to_slot + head * to_head + d * to_d, x, mask)


@triton.jit
def _append(
    key_ptr, value_ptr, key_cache_ptr, value_cache_ptr, positions_ptr, table_ptr,
    q_len, capacity, heads, head_dim, num_pages, page_size,
    position_stride, table_batch, table_page,
    k0, k1, k2, k3, v0, v1, v2, v3, kc0, kc1, kc2, kc3, vc0, vc1, vc2, vc3,
    HEADS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64) // q_len
    token = tl.program_id(0).to(tl.int64) % q_len
    entry = tl.load(positions_ptr + batch * position_stride).to(tl.int64) + token
    # A token outside the caches has no columns (the interpreter cannot splat a boolean).
    columns = tl.where((entry >= 0) & (entry < capacity), head_dim, 0)
    row, slot = batch, entry
    if table_ptr is not None:
        entry = tl.minimum(tl.maximum(entry, 0), capacity - 1)
        row = tl.load(table_ptr + batch * table_batch + entry // page_size * table_page)
        row = row.to(tl.int64)
        slot = entry % page_size
        columns = tl.where((row >= 0) & (row < num_pages), columns, 0)
    head = (tl.program_id(1).to(tl.int64) * HEADS + tl.arange(0, HEADS))[:, None]
    d = tl.arange(0, DIM).to(tl.int64)[None, :]
    mask = (head < heads) & (d < columns)
    _copy(key_ptr, key_cache_ptr, batch, token, row, slot, head, d, mask, k0, k1, k2, k3, kc0, kc1, kc2, kc3)  # noqa: E501  # fmt: skip
    _copy(value_ptr, value_cache_ptr, batch, token, row, slot, head, d, mask, v0, v1, v2, v3, vc0, vc1, vc2, vc3)  # noqa: E501  # fmt: skip


def append_kv(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, positions: Tensor
) -> None:
    append_kv_full(key, value, key_cache, value_cache, positions, None)


def append_kv_full(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, positions: Tensor,
    block_table: Tensor | None,
) -> None:  # fmt: skip
    if not key.numel():
        return
    batch, q_len, heads, head_dim = key.shape
    num_pages, page_size = key_cache.shape[:2]
    capacity = page_size if block_table is None else block_table.shape[1] * page_size
    DIM = triton.next_power_of_2(head_dim)
    HEADS = min(triton.next_power_of_2(heads), max(1, _TILE // DIM))
    _append[(batch * q_len, triton.cdiv(heads, HEADS))](
        key, value, key_cache, value_cache, positions, block_table, q_len, capacity, heads,
        head_dim, num_pages, page_size, positions.stride(0),
        *((0, 0) if block_table is None else block_table.stride()), *key.stride(),
        *value.stride(), *key_cache.stride(), *value_cache.stride(), HEADS=HEADS, DIM=DIM,
    )  # fmt: skip
