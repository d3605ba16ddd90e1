"""Attention of many queries, as torch.nn.functional has it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from aigc_fast.ops._autograd import transforming, wanted
from aigc_fast.ops._checks import check_tensor
from aigc_fast.ops._registry import define
from aigc_fast.ops.linear import mkl_lags

#: Queries from which packing keys and values is worth it: of any number, and of as many as caches
#: hold beside what is packed.
_QUERIES, _FEW_QUERIES, _FEW_KEYS = 32, 8, 512


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale * query key^T) value, as torch.nn.functional.scaled_dot_product_attention: same
    arguments, results and errors.

    query: (batch, heads, queries, head_dim).
    key:   (batch, kv_heads, keys, head_dim); fewer heads than query has with enable_gqa.
    value: (batch, kv_heads, keys, value_dim).

    On CPUs whose products torch leaves to an MKL that does not use AVX-512 (those that are not
    Intel's), and without a matrix unit, both products and the softmax between them are one operator
    of ours, two to three times as fast: from 32 queries on (8 where there are up to 512 keys),
    without a mask and dropout and where no gradient is wanted. y is then (batch, queries, heads,
    value_dim) in memory, as torch's is there.
    Computes in fp32 (fp64 for fp64); in 16 bits probabilities are rounded once, as in torch's.

    Everywhere else, under autocast, within torch.compile and torch.func it is torch's own function.

    Source: Dao et al., FlashAttention, arXiv:2205.14135; Rabe and Staats, arXiv:2112.05682.
    """
    if (
        not torch.compiler.is_compiling()
        and attn_mask is None
        and dropout_p == 0
        and _pays(query, key, value, enable_gqa)
    ):
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        factor = query.shape[3] ** -0.5 if scale is None else scale
        return dense_attention(query, key, value, factor, is_causal).transpose(1, 2)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _pays(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    """Whether the operator serves these tensors, and takes less time than torch's function."""
    return (
        mkl_lags()
        and query.dim() == key.dim() == value.dim() == 4
        and query.shape[2] >= (_FEW_QUERIES if key.shape[2] <= _FEW_KEYS else _QUERIES)
        and query.shape[0] == key.shape[0] == value.shape[0]
        and query.shape[3] == key.shape[3] > 0
        and key.shape[1:3] == value.shape[1:3]
        and 0 not in key.shape
        and (query.shape[1] == key.shape[1] or (enable_gqa and query.shape[1] % key.shape[1] == 0))
        and all(
            type(t) in (Tensor, torch.nn.Parameter)
            and t.dtype is query.dtype
            and t.device.type == "cpu"
            and t.layout is torch.strided
            for t in (query, key, value)
        )
        and query.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and not wanted(query, key, value)
        and not torch.is_autocast_enabled("cpu")
        and not transforming()
    )


def _reference(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> Tensor:
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    y = F.scaled_dot_product_attention(
        query, key, value, is_causal=causal, scale=scale, enable_gqa=True
    )
    return y.transpose(1, 2).contiguous()


def _check(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> None:
    check_tensor("query", query, ndim=4)
    for name, x in (("key", key), ("value", value)):
        check_tensor(name, x, like=("query", query), ndim=4)
    batch, _, heads, dim = query.shape
    check_tensor("key", key, shape=(batch, *key.shape[1:3], dim))
    check_tensor("value", value, shape=(*key.shape[:3], value.shape[3]))
    if 0 in key.shape[1:] or heads % key.shape[2]:
        raise ValueError(
            f"key must have tokens, and heads by which those of query ({heads}) divide, got "
            f"{tuple(key.shape)}"
        )


#: All of (batch, tokens, heads, head_dim).
dense_attention = define(
    "dense_attention(Tensor query, Tensor key, Tensor value, float scale, bool causal) -> Tensor",
    _reference,
    _check,
    stem=None,
)
