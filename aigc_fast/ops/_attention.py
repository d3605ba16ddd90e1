"""What decode_attention means, and the calls that it refuses."""

import torch
from torch import Tensor

from aigc_fast.ops._checks import can_look, check_device, check_positive, check_tensor
from aigc_fast.ops._layout import wide_dtype
from aigc_fast.ops._pages import NARROW, capacity_of, check_block_table, check_pages


def reference(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, cache_lengths: Tensor,
    scale: float | None, window: int | None = None, softcap: float | None = None,
    block_table: Tensor | None = None, sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None, key_scale: Tensor | None = None,
    value_scale: Tensor | None = None, fixed_split: int | None = None, mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, q_len, heads, head_dim = query.shape
    kv_heads = key_cache.shape[2]
    capacity = capacity_of(key_cache, block_table)
    scale = head_dim**-0.5 if scale is None else scale
    accumulate = wide_dtype(query.dtype)

    lengths = cache_lengths.long().clamp(0, capacity)
    entry = torch.arange(capacity, device=query.device)
    newest = torch.arange(q_len, device=query.device) - (q_len - 1)
    ends = (lengths[:, None] + newest)[..., None]
    valid = entry < lengths[:, None]
    visible = entry < ends  # (batch, q_len, capacity)
    if mask is not None:
        newest_entry = entry - lengths[:, None] + q_len  # its column in the mask, (batch, capacity)
        column = newest_entry.clamp(0, max(q_len - 1, 0))[:, None].expand_as(visible)
        seen = mask.expand(batch, q_len, q_len).gather(2, column)
        visible = valid[:, None] & (seen | (newest_entry < 0)[:, None])
    if window is not None:
        visible = visible & (entry >= ends - window)
        valid = valid & (entry > lengths[:, None] - q_len - window)
    if can_look(cache_lengths):
        _check_lengths(cache_lengths, capacity)
    key, value = key_cache.to(accumulate), value_cache.to(accumulate)
    if key_scale is not None:
        key = key * key_scale.to(accumulate)[:, None]
    if value_scale is not None:
        value = value * value_scale.to(accumulate)[:, None]
    if block_table is not None:
        num_pages, page_size = key_cache.shape[:2]
        if can_look(block_table):
            check_pages(block_table, valid.view(*block_table.shape, page_size).any(-1), num_pages)
        pages = block_table.long().clamp(0, num_pages - 1)
        key, value = key[pages].flatten(1, 2), value[pages].flatten(1, 2)
    value = value.where(valid[..., None, None], 0)

    grouped = query.to(accumulate).view(batch, q_len, kv_heads, heads // kv_heads, head_dim)
    scores = torch.einsum("bikgd,bjkd->bikgj", grouped, key) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(accumulate).view(kv_heads, heads // kv_heads, 1)
        scores = scores + slopes * (entry - (ends - 1))[:, :, None, None]
    scores = scores.masked_fill(~visible[:, :, None, None], -torch.inf)
    lse = scores.logsumexp(-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(accumulate).view(kv_heads, heads // kv_heads))
    probabilities = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    out = torch.einsum("bikgj,bjkd->bikgd", probabilities, value).to(query.dtype)
    return out.reshape(query.shape).contiguous(), lse.reshape(batch, q_len, heads).contiguous()


def _check_lengths(cache_lengths: Tensor, capacity: int) -> None:
    for sequence, length in enumerate(cache_lengths.tolist()):
        if not 0 <= length <= capacity:
            raise ValueError(
                f"cache_lengths must be in [0, {capacity}], got {length} for sequence {sequence}"
            )


def check(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, cache_lengths: Tensor,
    scale: float | None, window: int | None = None, softcap: float | None = None,
    block_table: Tensor | None = None, sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None, key_scale: Tensor | None = None,
    value_scale: Tensor | None = None, fixed_split: int | None = None, mask: Tensor | None = None,
) -> None:  # fmt: skip
    check_tensor("query", query, ndim=4)
    if not isinstance(key_cache, Tensor) or key_cache.dtype not in NARROW:
        check_tensor("key_cache", key_cache, like=("query", query), ndim=4)
    else:
        check_tensor("key_cache", key_cache, dtypes=NARROW, ndim=4)
    check_tensor("value_cache", value_cache, like=("key_cache", key_cache), shape=key_cache.shape)
    batch, q_len, heads, head_dim = query.shape
    kv_heads = key_cache.shape[2]
    if block_table is None and key_cache.shape[0] != batch:
        raise ValueError(
            f"key_cache must have the batch of query, {batch}, got {key_cache.shape[0]}"
        )
    if key_cache.shape[3] != head_dim or head_dim == 0:
        raise ValueError(
            "key_cache must have the head_dim of query, at least 1, "
            f"got {key_cache.shape[3]} and {head_dim}"
        )
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"query must have a multiple of key_cache's {kv_heads} heads, got {heads} "
            f"in shape (batch, length, heads, head_dim) {tuple(query.shape)}"
        )
    check_tensor("cache_lengths", cache_lengths, dtypes=(torch.int32, torch.int64), shape=(batch,))
    if window is not None:
        check_positive(window=window)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    if block_table is not None:
        check_block_table(block_table, ("query", query), ("key_cache", key_cache))
    if fixed_split is not None:
        check_positive(fixed_split=fixed_split)
    if mask is not None:
        check_tensor("mask", mask, dtypes=(torch.bool,))
        if mask.shape not in ((q_len, q_len), (batch, q_len, q_len)):
            raise ValueError(
                f"mask must have shape ({q_len}, {q_len}) or ({batch}, {q_len}, {q_len}), "
                f"got {tuple(mask.shape)}"
            )
    of_heads = {"sinks": sinks, "alibi_slopes": alibi_slopes}
    of_kv_heads = {"key_scale": key_scale, "value_scale": value_scale}
    for numbers, count in ((of_heads, heads), (of_kv_heads, kv_heads)):
        for name, x in numbers.items():
            if x is not None:
                check_tensor(name, x, shape=(count,))
    others = {"key_cache": key_cache, "cache_lengths": cache_lengths, "mask": mask}
    for name, x in (others | of_heads | of_kv_heads).items():
        check_device(name, x, ("query", query))
