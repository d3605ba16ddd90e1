"""Appends to preallocated caches of keys and values."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from aigc_fast.ops._checks import check_tensor
from aigc_fast.ops._pages import capacity_of, check_block_table, check_pages
from aigc_fast.ops._registry import Op


def append_kv(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    positions: Tensor,
    *,
    block_table: Tensor | None = None,
) -> None:
    """key_cache[b, positions[b] + i] = key[b, i] for every token i, and the same for value.

    key, value:              (batch, q_len, num_kv_heads, head_dim), float64/32/16 or bfloat16, of
                             any strides: views of a packed projection are read in place.
    key_cache, value_cache:  (batch, capacity, num_kv_heads, head_dim), dtype of key; written in
                             place, of any strides that give each element its own memory. With a
                             block_table: (num_pages, page_size, num_kv_heads, head_dim).
    positions:               int32 or int64 (batch,): the slot of each sequence's first new token.
    block_table:             int32 (batch, pages): entry j of a sequence is slot j % page_size of
                             the page block_table[sequence, j // page_size], and capacity is
                             pages * page_size. Where nothing is written the table may hold
                             anything; no two new tokens may share a slot.

    Inference only: where an input requires a gradient, RuntimeError unless gradients are disabled.

    Raises TypeError or ValueError for a wrong dtype, shape or device. On the CPU, ValueError where
    a position lies outside [0, capacity - q_len], or a page to be written outside [0, num_pages);
    nothing is written then. A GPU does not wait to look: there the tokens that would land outside
    the caches are dropped.
    Bytes that must move: 2 times key and value.
    """
    if torch.is_grad_enabled() and (
        key.requires_grad
        or value.requires_grad
        or key_cache.requires_grad
        or value_cache.requires_grad
    ):
        raise RuntimeError("append_kv has no derivative: call it under torch.no_grad()")
    if block_table is None:
        _append_kv(key, value, key_cache, value_cache, positions)
    else:
        _append_kv_full(key, value, key_cache, value_cache, positions, block_table)


def _reference(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, positions: Tensor,
    block_table: Tensor | None = None,
) -> None:  # fmt: skip
    if isinstance(key, FakeTensor) or key.is_meta or not key.numel():
        return
    (batch, q_len), on_cpu = key.shape[:2], key.device.type == "cpu"
    capacity = capacity_of(key_cache, block_table)
    entries = positions.long()[:, None] + torch.arange(q_len, device=key.device)
    inside = (entries >= 0) & (entries < capacity)
    if on_cpu and not inside.all():
        first = int((~inside).nonzero()[0, 0])
        raise ValueError(
            f"positions must lie in [0, capacity - q_len] = [0, {capacity - q_len}], "
            f"got {int(positions[first])} for sequence {first}"
        )
    if block_table is None:
        rows, slots = torch.arange(batch, device=key.device)[:, None].expand_as(entries), entries
    else:
        num_pages, page_size = key_cache.shape[:2]
        pages = entries.clamp(0, capacity - 1) // page_size
        if on_cpu:
            written = torch.zeros_like(block_table, dtype=torch.bool).scatter(1, pages, True)
            check_pages(block_table, written, num_pages)
        rows, slots = block_table.long().gather(1, pages), entries % page_size
        inside = inside & (rows >= 0) & (rows < num_pages)
    key_cache[rows[inside], slots[inside]] = key[inside]
    value_cache[rows[inside], slots[inside]] = value[inside]


def _check(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, positions: Tensor,
    block_table: Tensor | None = None,
) -> None:  # fmt: skip
    check_tensor("key", key, ndim=4)
    check_tensor("value", value, like=("key", key), shape=key.shape)
    check_tensor("key_cache", key_cache, like=("key", key), ndim=4)
    batch, q_len, num_kv_heads, head_dim = key.shape
    if block_table is not None:
        check_block_table(block_table, ("key", key), ("key_cache", key_cache))
        batch = key_cache.shape[0]
    shape = (batch, key_cache.shape[1], num_kv_heads, head_dim)
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        check_tensor(name, cache, like=("key", key), shape=shape)
        if any(s == 0 and n > 1 for s, n in zip(cache.stride(), cache.shape, strict=True)):
            raise ValueError(f"{name} must not be an expanded tensor, got strides {cache.stride()}")
    capacity = capacity_of(key_cache, block_table)
    if q_len > capacity:
        raise ValueError(f"key must have at most capacity = {capacity} tokens, got {q_len}")
    check_tensor("positions", positions, dtypes=(torch.int32, torch.int64), shape=(key.shape[0],))
    if positions.device != key.device:
        raise ValueError(
            f"positions must be on the device of key ({key.device}), got {positions.device}"
        )


_append_kv = Op(
    "append_kv(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache,"
    " Tensor positions) -> ()",
    _reference,
    _check,
    stem="kv_cache",
)
# An operator of its own, because options that are left out still cost 0.13 us each.
_append_kv_full = Op(
    "append_kv_full(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache,"
    " Tensor positions, Tensor? block_table) -> ()",
    _reference,
    _check,
    stem="kv_cache",
)
