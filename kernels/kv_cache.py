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
    from_ptr, to_ptr, batch, token, slot, head, d, mask, from_batch, from_token, from_head, from_d,
    to_batch, to_slot, to_head, to_d,
):  # fmt: skip
    at = from_ptr + batch * from_batch + token * from_token + head * from_head + d * from_d
    x = tl.load(at, mask)
    tl.store(to_ptr + batch * to_batch + slot * to_slot + head * to_head + d * to_d, x, mask)


@triton.jit
def _append(
    key_ptr, value_ptr, key_cache_ptr, value_cache_ptr, positions_ptr,
    q_len, capacity, heads, head_dim, position_stride,
    k0, k1, k2, k3, v0, v1, v2, v3, kc0, kc1, kc2, kc3, vc0, vc1, vc2, vc3,
    HEADS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64) // q_len
    token = tl.program_id(0).to(tl.int64) % q_len
    slot = tl.load(positions_ptr + batch * position_stride).to(tl.int64) + token
    head = (tl.program_id(1).to(tl.int64) * HEADS + tl.arange(0, HEADS))[:, None]
    d = tl.arange(0, DIM).to(tl.int64)[None, :]
    # A token outside the cache has no columns (the interpreter cannot splat a boolean).
    columns = tl.where((slot >= 0) & (slot < capacity), head_dim, 0)
    mask = (head < heads) & (d < columns)
    _copy(key_ptr, key_cache_ptr, batch, token, slot, head, d, mask, k0, k1, k2, k3, kc0, kc1, kc2, kc3)  # noqa: E501  # fmt: skip
    _copy(value_ptr, value_cache_ptr, batch, token, slot, head, d, mask, v0, v1, v2, v3, vc0, vc1, vc2, vc3)  # noqa: E501  # fmt: skip


def append_kv(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, positions: Tensor
) -> None:
    if not key.numel():
        return
    batch, q_len, heads, head_dim = key.shape
    DIM = triton.next_power_of_2(head_dim)
    HEADS = min(triton.next_power_of_2(heads), max(1, _TILE // DIM))
    _append[(batch * q_len, triton.cdiv(heads, HEADS))](
        key, value, key_cache, value_cache, positions, q_len, key_cache.shape[1], heads, head_dim,
        positions.stride(0), *key.stride(), *value.stride(), *key_cache.stride(),
        *value_cache.stride(), HEADS=HEADS, DIM=DIM,
    )  # fmt: skip
