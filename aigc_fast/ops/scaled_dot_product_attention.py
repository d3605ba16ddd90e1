"""Attention of many queries, as torch.nn.functional has it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from aigc_fast.ops._autograd import transforming
from aigc_fast.ops._checks import plain_on_cpu
from aigc_fast.ops._dense_attention import attend
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
    """y = softmax(scale * query key^T) value, as torch.nn.functional.scaled_dot_product_attention:
    same arguments, results and errors.

    query: (batch, heads, queries, head_dim), float64/32/16 or bfloat16.
    key:   (batch, kv_heads, keys, head_dim), dtype of query; fewer heads than query has with
           enable_gqa.
    value: (batch, kv_heads, keys, value_dim), dtype of query.
    y:     (batch, heads, queries, value_dim), dtype of query.

    torch leaves these products to MKL, which does not use AVX-512 on CPUs that are not Intel's.
    There both products and the softmax between them are one operator of ours, 1.5 to 5 times as
    fast, and so are their gradients: in float32 and 16 bits, from 32 queries on (8 where there are
    up to 512 keys), without a mask and dropout. y is then (batch, queries, heads, value_dim) in
    memory, so that joining the heads copies nothing. torch's y has the order of query in memory:
    where that is another, a `view` that works on torch's y may fail on this one. Computes in fp32;
    in 16 bits probabilities are rounded once, as torch does. Differentiable to any order; the
    first gradients are an operator.

    Everything else is torch's own function: on other CPUs and on GPUs, where autocast changes a
    dtype, where torch.nn.attention.sdpa_kernel rules out flash attention, within torch.compile and
    torch.func.

    Source: Dao et al., FlashAttention, arXiv:2205.14135; Rabe and Staats, arXiv:2112.05682.
    """
    if (
        attn_mask is None
        and dropout_p == 0
        and type(is_causal) is type(enable_gqa) is bool
        and has_attention(query, key, value, enable_gqa)
    ):
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        factor = query.shape[3] ** -0.5 if scale is None else scale
        return attend(query, key, value, factor, is_causal).transpose(1, 2)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def has_attention(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool = False) -> bool:
    """Whether the operator serves these tensors, and takes less time than torch's function."""
    return (
        not torch.compiler.is_compiling()
        and mkl_lags()
        and query.dim() == key.dim() == value.dim() == 4
        and query.shape[2] >= (_FEW_QUERIES if key.shape[2] <= _FEW_KEYS else _QUERIES)
        and query.shape[0] == key.shape[0] == value.shape[0]
        and query.shape[3] == key.shape[3] > 0
        and key.shape[1:3] == value.shape[1:3]
        and 0 not in key.shape
        and 0 not in value.shape
        and (query.shape[1] == key.shape[1] or (enable_gqa and query.shape[1] % key.shape[1] == 0))
        and plain_on_cpu((query, key, value), (query.dtype,))
        and query.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and (
            not torch.is_autocast_enabled("cpu")
            or query.dtype is torch.get_autocast_dtype("cpu")  # to which torch's would go
        )
        and torch.backends.cuda.flash_sdp_enabled()  # what sdpa_kernel says of CPUs too
        and not transforming()
    )
