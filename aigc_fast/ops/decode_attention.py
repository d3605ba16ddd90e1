"""Attention of the newest tokens to a key/value cache."""

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from aigc_fast.ops._checks import check_tensor
from aigc_fast.ops._pages import NARROW, can_look, capacity_of, check_block_table, check_pages
from aigc_fast.ops._registry import Op

_LSES = (torch.float32, torch.float64)


@overload
def decode_attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, cache_lengths: Tensor, *,
    scale: float | None = None, window: int | None = None, softcap: float | None = None,
    block_table: Tensor | None = None, sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None, key_scale: Tensor | None = None,
    value_scale: Tensor | None = None, fixed_split: int | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def decode_attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, cache_lengths: Tensor, *,
    scale: float | None = None, window: int | None = None, softcap: float | None = None,
    block_table: Tensor | None = None, sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None, key_scale: Tensor | None = None,
    value_scale: Tensor | None = None, fixed_split: int | None = None, return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_lengths: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    block_table: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    fixed_split: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * query @ key_cache.T + causal mask) @ value_cache, for each sequence.

    query:         (batch, q_len, num_heads, head_dim), float64/32/16 or bfloat16.
    key_cache:     (batch, capacity, num_kv_heads, head_dim), dtype of query; num_heads is a
                   multiple of num_kv_heads, and heads g * num_heads / num_kv_heads onwards share
                   key/value head g (grouped-query, or with one of them multi-query attention).
                   With a block_table: (num_pages, page_size, num_kv_heads, head_dim). May be int8,
                   float8_e4m3fn or float8_e5m2 beside any dtype of query.
    value_cache:   the shape and dtype of key_cache.
    cache_lengths: int32 or int64 (batch,), the valid entries of each sequence, in [0, capacity].
                   The q_len newest tokens are counted in: query i sees the entries
                   j < cache_length - q_len + i + 1.
    scale:         factor on the scores; None is 1 / sqrt(head_dim).
    window:        how many of the newest entries a query sees at most, its own included.
    softcap:       scaled scores become softcap * tanh(score / softcap).
    block_table:   int32 (batch, pages): entry j of a sequence is slot j % page_size of the page
                   block_table[sequence, j // page_size]; capacity is pages * page_size. Pages may
                   be shared. Where a sequence has no entry in sight the table may hold anything.
    sinks:         (num_heads,), a logit that takes part in the softmax and has no value: it makes
                   the weights of the values sum to less than one. Any floating dtype.
    alibi_slopes:  (num_heads,), slope * (j - position of the query) is added to the scores, after
                   softcap. Any floating dtype.
    key_scale, value_scale: (num_kv_heads,), what the numbers of each head of a cache are to be
                   multiplied by. Any floating dtype.
    fixed_split:   on GPUs, cut the entries in sight into parts of so many, rather than into as many
                   parts as fill the GPU: the bits of a sequence's result then depend on nothing but
                   its own query and entries. On CPUs every call is like that.
    return_lse:    also return log(sum(exp(scores))), by which parts of a cache can be merged; sinks
                   are part of the sum, so give them to one part only.

    Returns (batch, q_len, num_heads, head_dim) in the dtype of query, and with `return_lse` the
    natural logarithm as float32 (float64 for float64) of (batch, q_len, num_heads). A query that
    sees nothing gets zeros, and -inf (or its sink) as its logarithm. What lies beyond cache_lengths
    or before the window of every query is never used: it may be NaN. Computes in fp32 (fp64 for
    fp64) and rounds once.

    Views whose last dimension is contiguous are read in place; others are copied once. Bytes that
    must move: the entries in sight of both caches, once for all the heads of a group and all q_len.

    Raises TypeError or ValueError for a wrong dtype, shape or device, and on the CPU for a length
    outside [0, capacity] and a page outside [0, num_pages); GPUs clamp both, because looking would
    make the CPU wait. RuntimeError if a gradient is asked for: there is no derivative.

    Source: split-KV decoding (Dao et al. 2023, Flash-Decoding) with the online softmax of
    Milakov and Gimelshein (2018, arXiv:1805.02867); softcap as in Gemma 2 (arXiv:2408.00118), sinks
    as in gpt-oss, slopes of Press et al. (2021, arXiv:2108.12409), block tables as in vLLM
    (arXiv:2309.06180).
    """
    if torch.is_grad_enabled() and (
        query.requires_grad
        or key_cache.requires_grad
        or value_cache.requires_grad
        or any(
            x is not None and x.requires_grad for x in (sinks, alibi_slopes, key_scale, value_scale)
        )
    ):
        raise RuntimeError(
            "decode_attention has no derivative: call it under torch.no_grad(), or train with "
            "torch.nn.functional.scaled_dot_product_attention"
        )
    if (
        window is softcap is block_table is sinks is alibi_slopes is key_scale is value_scale
        is fixed_split is None
    ):  # fmt: skip
        out, lse = _decode_attention(query, key_cache, value_cache, cache_lengths, scale)
    else:
        out, lse = _decode_attention_full(
            query, key_cache, value_cache, cache_lengths, scale, window, softcap, block_table,
            sinks, alibi_slopes, key_scale, value_scale, fixed_split,
        )  # fmt: skip
    return (out, lse) if return_lse else out


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention to the whole of a cache from that to its parts, as of a prefix that many share.

    outs: two or more results of `decode_attention` for the same queries and different entries,
          (batch, q_len, num_heads, head_dim).
    lses: their logarithms, (batch, q_len, num_heads), float32 or float64.

    Returns what decode_attention with return_lse gives for all the entries: the results weighted by
    exp(lse), in their dtype, and log(sum(exp(lses))). Plain PyTorch, differentiable.

    Raises TypeError or ValueError for a wrong number, dtype, shape or device.
    """
    if len(outs) < 2 or len(outs) != len(lses):
        raise ValueError(
            f"outs and lses must be as many, at least 2, got {len(outs)} and {len(lses)}"
        )
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        name = f"outs[{i}]"
        check_tensor(name, out, like=("outs[0]", outs[0]) if i else None, shape=outs[0].shape)
        check_tensor(f"lses[{i}]", lse, dtypes=_LSES, shape=out.shape[:-1])
        if lse.device != out.device:
            raise ValueError(f"lses[{i}] must be on the device of {name} ({out.device})")
    parts = torch.stack(tuple(lses))
    whole = parts.logsumexp(0)
    weights = (parts - whole.masked_fill(whole == -torch.inf, 0)).exp()
    merged = sum(w[..., None] * out.to(w.dtype) for w, out in zip(weights, outs, strict=True))
    return merged.to(outs[0].dtype), whole


def _reference(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, cache_lengths: Tensor,
    scale: float | None, window: int | None = None, softcap: float | None = None,
    block_table: Tensor | None = None, sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None, key_scale: Tensor | None = None,
    value_scale: Tensor | None = None, fixed_split: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, q_len, heads, head_dim = query.shape
    kv_heads = key_cache.shape[2]
    capacity = capacity_of(key_cache, block_table)
    scale = head_dim**-0.5 if scale is None else scale
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32

    lengths = cache_lengths.long().clamp(0, capacity)
    entry = torch.arange(capacity, device=query.device)
    newest = torch.arange(q_len, device=query.device) - (q_len - 1)
    ends = (lengths[:, None] + newest)[..., None]
    visible = entry < ends  # (batch, q_len, capacity)
    valid = entry < lengths[:, None]
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


def _check(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, cache_lengths: Tensor,
    scale: float | None, window: int | None = None, softcap: float | None = None,
    block_table: Tensor | None = None, sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None, key_scale: Tensor | None = None,
    value_scale: Tensor | None = None, fixed_split: int | None = None,
) -> None:  # fmt: skip
    check_tensor("query", query, ndim=4)
    if not isinstance(key_cache, Tensor) or key_cache.dtype not in NARROW:
        check_tensor("key_cache", key_cache, like=("query", query), ndim=4)
    else:
        check_tensor("key_cache", key_cache, dtypes=NARROW, ndim=4)
    check_tensor("value_cache", value_cache, like=("key_cache", key_cache), shape=key_cache.shape)
    batch, _, heads, head_dim = query.shape
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
        raise ValueError(f"query must have a multiple of key_cache's {kv_heads} heads, got {heads}")
    check_tensor("cache_lengths", cache_lengths, dtypes=(torch.int32, torch.int64), shape=(batch,))
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    if block_table is not None:
        check_block_table(block_table, ("query", query), ("key_cache", key_cache))
    if fixed_split is not None and fixed_split < 1:
        raise ValueError(f"fixed_split must be at least 1, got {fixed_split}")
    of_heads = {"sinks": sinks, "alibi_slopes": alibi_slopes}
    of_kv_heads = {"key_scale": key_scale, "value_scale": value_scale}
    for numbers, count in ((of_heads, heads), (of_kv_heads, kv_heads)):
        for name, x in numbers.items():
            if x is not None:
                check_tensor(name, x, shape=(count,))
    others = {"key_cache": key_cache, "cache_lengths": cache_lengths}
    for name, x in (others | of_heads | of_kv_heads).items():
        if x is not None and x.device != query.device:
            raise ValueError(
                f"{name} must be on the device of query ({query.device}), got {x.device}"
            )


def _cuda_supports(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, cache_lengths: Tensor,
    scale: float | None,
) -> bool:  # fmt: skip
    """Up to 8 query rows a key/value head, and caches whose rows are whole 16-byte pieces.

    More rows are worth tensor cores, which the Triton kernel uses.
    """
    _, q_len, heads, head_dim = query.shape
    piece = 16 // query.element_size()
    return (
        key_cache.dtype == query.dtype != torch.float64
        and 0 < heads // key_cache.shape[2] * q_len <= 8
        and head_dim <= 256
        and head_dim % piece == 0
        and key_cache.shape[1] < 2**30
        and all(
            cache.stride(3) == 1
            and all(stride % piece == 0 for stride in cache.stride()[:3])
            and cache.data_ptr() % 16 == 0
            for cache in (key_cache, value_cache)
        )
    )


_decode_attention = Op(
    "decode_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_lengths,"
    " float? scale) -> (Tensor, Tensor)",
    _reference,
    _check,
    stem="decode_attention",
    cuda=_cuda_supports,
)
# The options have an operator of their own: left out, they would still cost 0.13 us each, and a
# plain call takes 4 us.
_decode_attention_full = Op(
    "decode_attention_full(Tensor query, Tensor key_cache, Tensor value_cache,"
    " Tensor cache_lengths, float? scale, int? window, float? softcap, Tensor? block_table,"
    " Tensor? sinks, Tensor? alibi_slopes, Tensor? key_scale, Tensor? value_scale,"
    " int? fixed_split) -> (Tensor, Tensor)",
    _reference,
    _check,
    stem="decode_attention",
)
