"""Attention of the newest tokens to a key/value cache."""

from typing import Literal, overload

import torch
from torch import Tensor

from aigc_fast.ops._attention import check, reference
from aigc_fast.ops._registry import define


@overload
def decode_attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, cache_lengths: Tensor, *,
    scale: float | None = None, window: int | None = None, softcap: float | None = None,
    block_table: Tensor | None = None, sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None, key_scale: Tensor | None = None,
    value_scale: Tensor | None = None, fixed_split: int | None = None,
    mask: Tensor | None = None, return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def decode_attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, cache_lengths: Tensor, *,
    scale: float | None = None, window: int | None = None, softcap: float | None = None,
    block_table: Tensor | None = None, sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None, key_scale: Tensor | None = None,
    value_scale: Tensor | None = None, fixed_split: int | None = None,
    mask: Tensor | None = None, return_lse: Literal[True],
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
    mask: Tensor | None = None,
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
    mask:          bool (q_len, q_len) or (batch, q_len, q_len): which of the q_len newest entries
                   each query sees, in place of the causal order, as where drafts branch like a
                   tree. The entries before them are seen by all. Distances, of window and
                   alibi_slopes, still go by the order in the cache.
    return_lse:    also return log(sum(exp(scores))), by which parts of a cache can be merged; sinks
                   are part of the sum, so give them to one part only.

    Returns (batch, q_len, num_heads, head_dim) in the dtype of query, and with `return_lse` the
    natural logarithm as float32 (float64 for float64) of (batch, q_len, num_heads). A query that
    sees nothing gets zeros, and -inf (or its sink) as its logarithm. What lies beyond cache_lengths
    or before the window of every query is never used: it may be NaN. Computes in fp32 (fp64 for
    fp64) and rounds once, but for these: where all is bfloat16, CPUs with instructions for it
    (AVX512_BF16, AMX) take subnormal keys as zero, AMX probabilities right to 16 bits; over int8
    caches AVX512_VNNI takes queries of 16 bits to 2^-16 of the largest in their row, probabilities
    of that in their block, and to 2^-31 where others are small beside it; on a GPU Triton rounds
    probabilities to the dtype of query.

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
        is fixed_split is mask is None
    ):  # fmt: skip
        out, lse = _decode_attention(query, key_cache, value_cache, cache_lengths, scale)
    else:
        out, lse = _decode_attention_full(
            query, key_cache, value_cache, cache_lengths, scale, window, softcap, block_table,
            sinks, alibi_slopes, key_scale, value_scale, fixed_split, mask,
        )  # fmt: skip
    return (out, lse) if return_lse else out


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


_decode_attention = define(
    "decode_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_lengths,"
    " float? scale) -> (Tensor, Tensor)",
    reference,
    check,
    stem="decode_attention",
    cuda=_cuda_supports,
)
# The options have an operator of their own: left out, they would still cost 0.13 us each, and a
# plain call takes 4 us.
_decode_attention_full = define(
    "decode_attention_full(Tensor query, Tensor key_cache, Tensor value_cache,"
    " Tensor cache_lengths, float? scale, int? window, float? softcap, Tensor? block_table,"
    " Tensor? sinks, Tensor? alibi_slopes, Tensor? key_scale, Tensor? value_scale,"
    " int? fixed_split, Tensor? mask) -> (Tensor, Tensor)",
    reference,
    check,
    stem="decode_attention",
)
