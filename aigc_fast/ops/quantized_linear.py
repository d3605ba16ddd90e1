"""A linear layer whose weight is kept as 4- or 8-bit codes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from aigc_fast.ops._checks import check_device, check_tensor
from aigc_fast.ops._layout import wide
from aigc_fast.ops._quantized_format import check_in_features, check_packed, dequantize_weight
from aigc_fast.ops._registry import define
from aigc_fast.ops.linear import linear


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int | None = None,
    quantize_activations: bool = False,
) -> Tensor:
    """y = x @ W.T + bias, W the weight that the codes stand for.

    x:            (..., in_features), float64/32/16 or bfloat16.
    weight:       uint8 (ceil(out_features / 16), groups, bytes) from `pack_weight` or
                  `quantize_weight`: codes of `bits` bits with an fp16 scale for each row and group
                  of columns, and an fp16 minimum where the weight is asymmetric.
    bias:         (out_features,), dtype of x, or None.
    bits:         4 or 8.
    group_size:   columns that share a scale: a multiple of 8 for 4 bits, of 4 for 8 bits.
    out_features: rows of W; the last tile may be padded.
    in_features:  columns of W, or None: then x may have any width that the padded columns of a
                  weight of one group allow, up to 7 fewer for 4 bits, 3 for 8.
    quantize_activations: also round x to int8, each group by its own scale max|x| / 127, and
                  multiply integers. Faster on CPUs, where it is what llama.cpp does; the error is
                  that of the rounding, about 0.4% of the largest product of a group.

    Returns (..., out_features) in the dtype of x. Sums in fp32 (fp64 for fp64); products of codes
    are exact. Bytes that must move: the weight, once for all rows of x; with few rows that is all
    there is to wait for. The result for a row does not depend on the others, with two exceptions.
    On GPUs up to 8 rows take the CUDA C++ kernel, more take Triton's. On CPUs 64 rows and more of
    16 bits, unless they are rounded to int8, are multiplied with dense pieces of the weight, 4 MB
    at a time in their dtype.

    Raises TypeError or ValueError for a wrong dtype, shape or device, RuntimeError if a gradient
    is asked for: there is no derivative.

    Source: the group-wise formats of GGUF (ggml, Q4_0, Q4_1, Q8_0) with rows interleaved.
    """
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        raise RuntimeError(
            "quantized_linear has no derivative: call it under torch.no_grad(), or train with the "
            "weight of dequantize_weight"
        )
    if in_features is not None and (x.dim() == 0 or x.shape[-1] != in_features):
        raise ValueError(f"x must have in_features = {in_features} last, got {tuple(x.shape)}")
    return _quantized_linear(x, weight, bias, bits, group_size, out_features, quantize_activations)


def _reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, bits: int, group_size: int, out_features: int,
    quantize_activations: bool,
) -> Tensor:  # fmt: skip
    dense = dequantize_weight(weight, bits, group_size, out_features, x.shape[-1], x.dtype)
    if quantize_activations:
        x = _rounded(x, group_size)
    return linear(x, dense, bias)


def _rounded(x: Tensor, group_size: int) -> Tensor:
    """x as int8 codes of each group would give it back."""
    padded = F.pad(wide(x), (0, -x.shape[-1] % group_size))
    grouped = padded.unflatten(-1, (-1, group_size))
    top = grouped.abs().amax(-1, keepdim=True)
    codes = (grouped * (127 / top)).nan_to_num(0, 0, 0).round()
    return (codes * (top / 127)).flatten(-2)[..., : x.shape[-1]].to(x.dtype)


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, bits: int, group_size: int, out_features: int,
    quantize_activations: bool,
) -> None:  # fmt: skip
    check_tensor("x", x)
    check_packed("weight", weight, bits, group_size, out_features)
    check_device("weight", weight, ("x", x))
    width = x.shape[-1] if x.dim() else 0
    check_in_features("x must have the in_features of weight", width, weight, bits, group_size)
    if bias is not None:
        check_tensor("bias", bias, like=("x", x), shape=(out_features,))


def _cuda_supports(
    x: Tensor, weight: Tensor, bias: Tensor | None, bits: int, group_size: int, out_features: int,
    quantize_activations: bool,
) -> bool:  # fmt: skip
    """Up to 8 rows, which one product on tensor cores has room for, and a weight that can be read
    16 bytes at a time. More rows are a matter for the Triton kernel, which reuses the weight."""
    return (
        x.dtype != torch.float64
        and 0 < x.numel() <= 8 * x.shape[-1]
        and weight.shape[1] * group_size < 2**24
        and out_features < 2**28
        and weight.is_contiguous()
        and weight.data_ptr() % 16 == 0
    )


_quantized_linear = define(
    "quantized_linear(Tensor x, Tensor weight, Tensor? bias, int bits, int group_size,"
    " int out_features, bool quantize_activations) -> Tensor",
    _reference,
    _check,
    stem="quantized_linear",
    cuda=_cuda_supports,
)
