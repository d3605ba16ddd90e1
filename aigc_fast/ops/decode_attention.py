"""Attention of the newest tokens to a key/value cache."""

from typing import Literal, overload

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from aigc_fast.ops._checks import check_tensor
from aigc_fast.ops._registry import Op


@overload
def decode_attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, cache_lengths: Tensor, *,
    scale: float | None = None, return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def decode_attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, cache_lengths: Tensor, *,
    scale: float | None = None, return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_lengths: Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * query @ key_cache.T + causal mask) @ value_cache, for each sequence.

    query:         (batch, q_len, num_heads, head_dim), float64/32/16 or bfloat16.
    key_cache:     (batch, capacity, num_kv_heads, head_dim), dtype of query; num_heads is a
                   multiple of num_kv_heads, and heads g * num_heads / num_kv_heads onwards share
                   key/value head g (grouped-query, or with one of them multi-query attention).
    value_cache:   the shape and dtype of key_cache.
    cache_lengths: int32 or int64 (batch,), the valid entries of each sequence, in [0, capacity].
                   The q_len newest tokens are counted in: query i sees the entries
                   j < cache_length - q_len + i + 1.
    scale:         factor on the scores; None is 1 / sqrt(head_dim).
    return_lse:    also return log(sum(exp(scores))), by which parts of a cache can be merged.

    Returns (batch, q_len, num_heads, head_dim) in the dtype of query, and with `return_lse` the
    natural logarithm as float32 (float64 for float64) of (batch, q_len, num_heads). A query that
    sees nothing gets zeros, and -inf as its logarithm. What lies beyond cache_lengths is never
    used: it may be NaN. Computes in fp32 (fp64 for fp64) and rounds once.

    Views whose last dimension is contiguous are read in place; others are copied once. Bytes that
    must move: the valid entries of both caches, once for all the heads of a group and all q_len.

    Raises TypeError or ValueError for a wrong dtype, shape or device, and on the CPU for a length
    outside [0, capacity]; GPUs clamp lengths to that range, because looking would make the CPU
    wait. RuntimeError if a gradient is asked for: there is no derivative.

    Source: split-KV decoding (Dao et al. 2023, Flash-Decoding) with the online softmax of
    Milakov and Gimelshein (2018, arXiv:1805.02867).
    """
    if torch.is_grad_enabled() and (
        query.requires_grad or key_cache.requires_grad or value_cache.requires_grad
    ):
        raise RuntimeError(
            "decode_attention has no derivative: call it under torch.no_grad(), or train with "
            "torch.nn.functional.scaled_dot_product_attention"
        )
    out, lse = _decode_attention(query, key_cache, value_cache, cache_lengths, scale)
    return (out, lse) if return_lse else out


def _reference(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, cache_lengths: Tensor,
    scale: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, q_len, heads, head_dim = query.shape
    capacity, kv_heads = key_cache.shape[1:3]
    _check_lengths(cache_lengths, capacity)
    scale = head_dim**-0.5 if scale is None else scale
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32

    lengths = cache_lengths.long().clamp(0, capacity)
    entry = torch.arange(capacity, device=query.device)
    newest = torch.arange(q_len, device=query.device) - (q_len - 1)
    visible = entry < (lengths[:, None] + newest)[..., None]  # (batch, q_len, capacity)
    valid = entry < lengths[:, None]
    value = value_cache.where(valid[..., None, None], 0).to(accumulate)

    grouped = query.to(accumulate).view(batch, q_len, kv_heads, heads // kv_heads, head_dim)
    scores = torch.einsum("bikgd,bjkd->bikgj", grouped, key_cache.to(accumulate)) * scale
    scores = scores.masked_fill(~visible[:, :, None, None], -torch.inf)
    lse = scores.logsumexp(-1)
    probabilities = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    out = torch.einsum("bikgj,bjkd->bikgd", probabilities, value).to(query.dtype)
    return out.reshape(query.shape).contiguous(), lse.reshape(batch, q_len, heads).contiguous()


def _check_lengths(cache_lengths: Tensor, capacity: int) -> None:
    """Only where looking costs nothing: neither on a GPU nor while a graph is traced."""
    if cache_lengths.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if isinstance(cache_lengths, FakeTensor):
        return
    for sequence, length in enumerate(cache_lengths.tolist()):
        if not 0 <= length <= capacity:
            raise ValueError(
                f"cache_lengths must be in [0, {capacity}], got {length} for sequence {sequence}"
            )


def _check(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, cache_lengths: Tensor,
    scale: float | None,
) -> None:  # fmt: skip
    check_tensor("query", query, ndim=4)
    check_tensor("key_cache", key_cache, like=("query", query), ndim=4)
    check_tensor("value_cache", value_cache, like=("query", query), shape=key_cache.shape)
    batch, _, heads, head_dim = query.shape
    kv_heads = key_cache.shape[2]
    if key_cache.shape[0] != batch:
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
    if cache_lengths.device != query.device:
        raise ValueError(
            f"cache_lengths must be on the device of query ({query.device}), "
            f"got {cache_lengths.device}"
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
        query.dtype != torch.float64
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
