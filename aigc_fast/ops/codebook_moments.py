"""How many vectors chose each code, and their sums: what moving averages of a codebook take."""

import torch
from torch import Tensor

from aigc_fast.ops._checks import check_device, check_positive, check_tensor
from aigc_fast.ops._layout import wide
from aigc_fast.ops._registry import define
from aigc_fast.ops.vector_quantize import as_vectors


def codebook_moments(
    x: Tensor, indices: Tensor, num_codes: int, *, dim: int = -1
) -> tuple[Tensor, Tensor]:
    """(counts, sums) of the vectors of x by code.

        counts[k] = how many n have indices[n] = k
        sums[k]   = sum over these n of x[n]

    x:         any shape, float64/32/16 or bfloat16; its vectors lie along `dim`.
    indices:   int64 from 0 to num_codes - 1, the shape of x without `dim`: `vector_quantize` gives
               them. A GPU does not see others.
    num_codes: at least 1.
    counts:    int64 (num_codes,).
    sums:      float32 (float64 for float64), (num_codes, features); on CPUs added in float64.

    No one-hot matrix is made and nothing is added atomically: every call gives the same bits, with
    any number of threads. Bytes that must move: x, the indices and sums. Has no derivative.

    Raises TypeError or ValueError for a wrong dtype, shape, device, dim or num_codes; on CPUs for
    an index out of range.

    Source: van den Oord, Vinyals and Kavukcuoglu 2017, arXiv:1711.00937, appendix A.1.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError("codebook_moments has no derivative: call it under torch.no_grad()")
    rows, _ = as_vectors(x, dim)
    shape = x.movedim(dim, -1).shape[:-1]
    check_tensor("indices", indices, dtypes=(torch.int64,), shape=shape)
    return _codebook_moments(rows, indices.reshape(rows.shape[0], rows.shape[2]), num_codes)


def _reference(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    flat = indices.flatten()
    counts = flat.new_zeros(num_codes).index_add(0, flat, torch.ones_like(flat))
    rows = wide(x).movedim(1, -1).flatten(0, 1)
    return counts, rows.new_zeros(num_codes, x.shape[1]).index_add(0, flat, rows)


def _check(x: Tensor, indices: Tensor, num_codes: int) -> None:
    check_tensor("x", x, ndim=3)
    if x.shape[1] < 1:
        raise ValueError("x must have vectors of at least one feature")
    check_tensor("indices", indices, dtypes=(torch.int64,), shape=(x.shape[0], x.shape[2]))
    check_device("indices", indices, ("x", x))
    check_positive(num_codes=num_codes)


_codebook_moments = define(
    "codebook_moments(Tensor x, Tensor indices, int num_codes) -> (Tensor, Tensor)",
    _reference,
    _check,
    stem="vector_quantize",
)
