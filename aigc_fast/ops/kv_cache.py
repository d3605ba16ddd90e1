"""Appends to preallocated caches of keys and values."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from aigc_fast.ops._checks import check_device, check_tensor
from aigc_fast.ops._layout import wide_dtype
from aigc_fast.ops._pages import NARROW, capacity_of, check_block_table, check_pages
from aigc_fast.ops._registry import define
from aigc_fast.ops.rotary import _reference as _rotate
from aigc_fast.ops.rotary import check_angles


def append_kv(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    positions: Tensor,
    *,
    block_table: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> None:
    """key_cache[b, positions[b] + i] = key[b, i] for every token i, and the same for value; on the
    way the keys may be rotated and both rounded to narrow caches, in one pass.

    key, value:              (batch, q_len, num_kv_heads, head_dim), float64/32/16 or bfloat16, of
                             any strides: views of a packed projection are read in place.
    key_cache, value_cache:  (batch, capacity, num_kv_heads, head_dim), of one dtype: that of key,
                             int8, float8_e4m3fn or float8_e5m2; written in place, of any strides
                             that give each element its own memory. With a block_table:
                             (num_pages, page_size, num_kv_heads, head_dim).
    positions:               int32 or int64 (batch,): the slot of each sequence's first new token.
    block_table:             int32 (batch, pages): entry j of a sequence is slot j % page_size of
                             the page block_table[sequence, j // page_size], and capacity is
                             pages * page_size. Where nothing is written the table may hold
                             anything; no two new tokens may share a slot.
    cos, sin, interleaved:   as for `apply_rotary`, the angles of the new tokens. Only the keys are
                             turned: the query, which goes nowhere, is `apply_rotary`'s.
    key_scale, value_scale:  (num_kv_heads,), any floating dtype: what `decode_attention` will
                             multiply the numbers of each head by. Stored is x * (1 / scale).

    A number is rounded once, to the nearest that the cache can hold (to even where two are as
    near); beyond the largest the largest is stored. NaN stays NaN, and becomes 0 in int8. Computes
    in fp32 (fp64 for fp64).

    Inference only: where an input requires a gradient, RuntimeError unless gradients are disabled.

    Raises TypeError or ValueError for a wrong dtype, shape or device. On the CPU, ValueError where
    a position lies outside [0, capacity - q_len], or a page to be written outside [0, num_pages);
    nothing is written then. A GPU does not wait to look: there the tokens that would land outside
    the caches are dropped.
    Bytes that must move: key and value in, and as many numbers out, in the dtype of the caches.
    """
    if torch.is_grad_enabled() and (
        key.requires_grad
        or value.requires_grad
        or key_cache.requires_grad
        or value_cache.requires_grad
    ):
        raise RuntimeError("append_kv has no derivative: call it under torch.no_grad()")
    if block_table is cos is sin is key_scale is value_scale is None:
        _append_kv(key, value, key_cache, value_cache, positions)
    else:
        _append_kv_full(
            key, value, key_cache, value_cache, positions, block_table, cos, sin, interleaved,
            key_scale, value_scale,
        )  # fmt: skip


def _reference(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, positions: Tensor,
    block_table: Tensor | None = None, cos: Tensor | None = None, sin: Tensor | None = None,
    interleaved: bool = False, key_scale: Tensor | None = None, value_scale: Tensor | None = None,
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
    accumulate = wide_dtype(key.dtype)
    if cos is not None and sin is not None:
        key = _rotate(key.to(accumulate), cos, sin, interleaved)
    for x, cache, scale in ((key, key_cache, key_scale), (value, value_cache, value_scale)):
        if scale is not None:
            x = x.to(accumulate) * (1 / scale.to(accumulate))[:, None]
        x = _nearest(x[inside], cache.dtype)
        if x.element_size() == 1:  # torch cannot index fp8
            x, cache = x.view(torch.uint8), cache.view(torch.uint8)
        cache[rows[inside], slots[inside]] = x


def _nearest(x: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.int8:
        return x.nan_to_num(nan=0.0).round().clamp(-128, 127).to(dtype)
    if dtype in NARROW:
        x = x.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    return x.to(dtype)


def _check(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, positions: Tensor,
    block_table: Tensor | None = None, cos: Tensor | None = None, sin: Tensor | None = None,
    interleaved: bool = False, key_scale: Tensor | None = None, value_scale: Tensor | None = None,
) -> None:  # fmt: skip
    check_tensor("key", key, ndim=4)
    check_tensor("value", value, like=("key", key), shape=key.shape)
    narrow = isinstance(key_cache, Tensor) and key_cache.dtype in NARROW
    check_tensor(
        "key_cache", key_cache, ndim=4, dtypes=NARROW, like=None if narrow else ("key", key)
    )
    batch, q_len, num_kv_heads, head_dim = key.shape
    if block_table is not None:
        check_block_table(block_table, ("key", key), ("key_cache", key_cache))
        batch = key_cache.shape[0]
    shape = (batch, key_cache.shape[1], num_kv_heads, head_dim)
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        check_tensor(name, cache, like=("key_cache", key_cache), shape=shape)
        if any(s == 0 and n > 1 for s, n in zip(cache.stride(), cache.shape, strict=True)):
            raise ValueError(f"{name} must not be an expanded tensor, got strides {cache.stride()}")
    capacity = capacity_of(key_cache, block_table)
    if q_len > capacity:
        raise ValueError(f"key must have at most capacity = {capacity} tokens, got {q_len}")
    check_tensor("positions", positions, dtypes=(torch.int32, torch.int64), shape=(key.shape[0],))
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin must be given together")
    if cos is not None and sin is not None:
        check_angles(("key", key), cos, sin)
    scales = {"key_scale": key_scale, "value_scale": value_scale}
    for name, scale in scales.items():
        if scale is not None:
            check_tensor(name, scale, shape=(num_kv_heads,))
    for name, x in ({"key_cache": key_cache, "positions": positions} | scales).items():
        check_device(name, x, ("key", key))


_append_kv = define(
    "append_kv(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache,"
    " Tensor positions) -> ()",
    _reference,
    _check,
    stem="kv_cache",
)
# An operator of its own, because options that are left out still cost 0.13 us each.
_append_kv_full = define(
    "append_kv_full(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache,"
    " Tensor positions, Tensor? block_table, Tensor? cos, Tensor? sin, bool interleaved,"
    " Tensor? key_scale, Tensor? value_scale) -> ()",
    _reference,
    _check,
    stem="kv_cache",
)
