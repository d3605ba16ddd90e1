"""Appends to preallocated caches of keys and values."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from aigc_fast.ops._checks import check_tensor
from aigc_fast.ops._registry import Op


def append_kv(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, positions: Tensor
) -> None:
    """key_cache[b, positions[b] + i] = key[b, i] for every token i, and the same for value.

    key, value:              (batch, q_len, num_kv_heads, head_dim), float64/32/16 or bfloat16, of
                             any strides: views of a packed projection are read in place.
    key_cache, value_cache:  (batch, capacity, num_kv_heads, head_dim), dtype of key; written in
                             place, of any strides that give each element its own memory.
    positions:               int32 or int64 (batch,): the slot of each sequence's first new token.

    Inference only: where an input requires a gradient, RuntimeError unless gradients are disabled.

    Raises TypeError or ValueError for a wrong dtype, shape or device. On the CPU, ValueError where
    a position lies outside [0, capacity - q_len]; nothing is written then. A GPU does not wait to
    look: there the tokens that would land outside the cache are dropped.
    Bytes that must move: 2 times key and value.
    """
    if torch.is_grad_enabled() and (
        key.requires_grad
        or value.requires_grad
        or key_cache.requires_grad
        or value_cache.requires_grad
    ):
        raise RuntimeError("append_kv has no derivative: call it under torch.no_grad()")
    _append_kv(key, value, key_cache, value_cache, positions)


def _reference(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, positions: Tensor
) -> None:
    if isinstance(key, FakeTensor) or key.is_meta:
        return
    capacity, q_len = key_cache.shape[1], key.shape[1]
    if key.device.type == "cpu":
        bad = (positions < 0) | (positions > capacity - q_len)
        if bad.any():
            first = int(bad.nonzero()[0])
            raise ValueError(
                f"positions must lie in [0, capacity - q_len] = [0, {capacity - q_len}], "
                f"got {int(positions[first])} for sequence {first}"
            )
    slots = positions.long()[:, None] + torch.arange(q_len, device=key.device)
    b, i = ((slots >= 0) & (slots < capacity)).nonzero(as_tuple=True)
    key_cache[b, slots[b, i]] = key[b, i]
    value_cache[b, slots[b, i]] = value[b, i]


def _check(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, positions: Tensor
) -> None:
    check_tensor("key", key, ndim=4)
    check_tensor("value", value, like=("key", key), shape=key.shape)
    check_tensor("key_cache", key_cache, like=("key", key), ndim=4)
    batch, q_len, num_kv_heads, head_dim = key.shape
    capacity = key_cache.shape[1]
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        shape = (batch, capacity, num_kv_heads, head_dim)
        check_tensor(name, cache, like=("key", key), shape=shape)
        if any(s == 0 and n > 1 for s, n in zip(cache.stride(), cache.shape, strict=True)):
            raise ValueError(f"{name} must not be an expanded tensor, got strides {cache.stride()}")
    if q_len > capacity:
        raise ValueError(f"key must have at most capacity = {capacity} tokens, got {q_len}")
    check_tensor("positions", positions, dtypes=(torch.int32, torch.int64), shape=(batch,))
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
