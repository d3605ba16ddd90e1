"""The nearest code of every vector, with the straight-through gradient, in one operator."""

import math
from typing import Any

import torch
from torch import Tensor

from aigc_fast.ops._autograd import OpFunction, transforming
from aigc_fast.ops._checks import check_tensor
from aigc_fast.ops._layout import wide
from aigc_fast.ops._registry import define


def vector_quantize(
    x: Tensor, codebook: Tensor, *, dim: int = -1, beta: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """(quantized, indices, distances): codes nearest to the vectors of x, by Euclidean distance.

        indices[n]   = argmin over k of |x[n] - codebook[k]|^2, of equal ones the lowest k
        quantized[n] = codebook[indices[n]]
        distances[n] = |x[n] - quantized[n]|^2

    x:         any shape, float64/32/16 or bfloat16; its vectors lie along `dim`.
    codebook:  (codes, features) with at least one code, dtype of x; features is the size of x along
               `dim`, at least 1.
    beta:      scales the gradient that distances give x.
    quantized: shape and dtype of x.
    indices:   int64, the shape of x without `dim`.
    distances: their shape, float32 (float64 for float64).

    Derivatives. That of `quantized` goes straight through: x gets the gradient of quantized, the
    codebook gets none. For `distances`, with g their gradient,

        grad_x[n] = 2 beta g[n] (x[n] - quantized[n])
        grad_codebook[k] = sum over n with indices[n] = k of -2 g[n] (x[n] - quantized[n])

    so that `distances.mean()` has the gradient of VQ-VAE's |sg(x) - e|^2 + beta |x - sg(e)|^2,
    where sg is the stop-gradient. A codebook that moving averages learn should be detached.

    No matrix of distances is written. Scores are |e|^2 / 2 - x.e in fp32 (fp64 for fp64), so the
    code that is chosen may be farther than the nearest one by the rounding of these: its squared
    distance by at most 2^-22 features |e| (|x| + |e|), where |e| is the length of the longest code.
    A score that is NaN counts as infinite; where all are, the index is 0. Distances are sums of
    (x - e)^2, as exact as their terms. Bytes that must move: forward x, the codebook and quantized;
    backward x and two gradients of its size.

    Contiguous x and x in channels_last are read where they lie, for any `dim`; other strides are
    copied once. The bits do not depend on the number of threads.

    Raises TypeError or ValueError for a wrong dtype, shape, device or dim.

    Source: van den Oord, Vinyals and Kavukcuoglu 2017, arXiv:1711.00937.
    """
    rows, last = as_vectors(x, dim)
    if transforming() or (torch.is_grad_enabled() and (x.requires_grad or codebook.requires_grad)):
        quantized, distances, indices = _VectorQuantize.call(rows, codebook, beta)
    else:
        quantized, distances, indices = _vector_quantize(rows, codebook)
    moved = x.movedim(dim, -1).shape
    quantized = quantized.view(moved).movedim(-1, dim) if last else quantized.view(x.shape)
    return quantized, indices.view(moved[:-1]), distances.view(moved[:-1])


def as_vectors(x: Tensor, dim: int) -> tuple[Tensor, bool]:
    """x as (outer, features, inner), and whether the features lie last in memory: inner is 1."""
    check_tensor("x", x)
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim must be from {-x.dim()} to {x.dim() - 1}, got {dim}")
    dim %= x.dim()
    moved = x.movedim(dim, -1)
    before, after = math.prod(x.shape[:dim]), math.prod(x.shape[dim + 1 :])
    if moved.is_contiguous() or after == 1:
        return moved.reshape(before * after, x.shape[dim], 1), True
    return x.reshape(before, x.shape[dim], after), False


def _reference(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, codes = wide(x).movedim(1, -1), wide(codebook)
    scores = codes.square().sum(-1) / 2 - rows @ codes.T
    indices = torch.where(scores.isnan(), torch.inf, scores).argmin(-1)
    quantized = codebook[indices]
    distances = (rows - wide(quantized)).square().sum(-1)
    return quantized.movedim(-1, 1).contiguous(), distances, indices


def _reference_backward(
    grad_distances: Tensor,
    grad_quantized: Tensor | None,
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    beta: float,
    codebook_grad: bool,
) -> tuple[Tensor, Tensor]:
    off = wide(x).movedim(1, -1) - wide(codebook)[indices]
    pull = 2 * grad_distances.unsqueeze(-1) * off
    dx = (beta * pull).movedim(-1, 1)
    if grad_quantized is not None:
        dx = dx + wide(grad_quantized)
    dcodebook = torch.zeros_like(codebook if codebook_grad else codebook[:0], dtype=pull.dtype)
    if codebook_grad:
        dcodebook = dcodebook.index_add(0, indices.flatten(), -pull.flatten(0, 1))
    return dx.to(x.dtype).contiguous(), dcodebook.to(x.dtype)


def _check(x: Tensor, codebook: Tensor) -> None:
    check_tensor("x", x, ndim=3)
    check_tensor("codebook", codebook, like=("x", x), ndim=2)
    if codebook.shape[0] < 1 or codebook.shape[1] != x.shape[1] or x.shape[1] < 1:
        raise ValueError(
            f"codebook must have at least one code of the features of x ({x.shape[1]}, at least 1)"
            f", got shape {tuple(codebook.shape)}"
        )


def _check_backward(
    grad_distances: Tensor,
    grad_quantized: Tensor | None,
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    beta: float,
    codebook_grad: bool,
) -> None:
    _check(x, codebook)
    shape = (x.shape[0], x.shape[2])
    dtype = torch.promote_types(x.dtype, torch.float32)
    check_tensor("grad_distances", grad_distances, dtypes=(dtype,), shape=shape)
    check_tensor("indices", indices, dtypes=(torch.int64,), shape=shape)
    if grad_quantized is not None:
        check_tensor("grad_quantized", grad_quantized, like=("x", x), shape=x.shape)


_vector_quantize = define(
    "vector_quantize(Tensor x, Tensor codebook) -> (Tensor, Tensor, Tensor)",
    _reference,
    _check,
    stem="vector_quantize",
)
_backward = define(
    "vector_quantize_backward(Tensor grad_distances, Tensor? grad_quantized, Tensor x,"
    " Tensor codebook, Tensor indices, float beta, bool codebook_grad) -> (Tensor, Tensor)",
    _reference_backward,
    _check_backward,
    stem="vector_quantize",
)


class _VectorQuantize(OpFunction):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codebook: Tensor, beta: float) -> tuple[Tensor, ...]:
        quantized, distances, indices = _vector_quantize(x, codebook)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(indices)
        ctx.beta = beta
        ctx.save_for_backward(x, codebook, indices)
        return quantized, distances, indices

    @staticmethod
    def backward(ctx: Any, dquantized: Tensor | None, ddistances: Tensor | None, _: None) -> tuple:
        if ddistances is None:
            return dquantized, None, None
        # Under create_graph made of differentiable operations: higher derivatives are torch's own.
        run: Any = _reference_backward if torch.is_grad_enabled() else _backward
        needed = ctx.needs_input_grad[1]
        dx, dcodebook = run(ddistances, dquantized, *ctx.saved_tensors, ctx.beta, needed)
        return dx, dcodebook if needed else None, None

    @classmethod
    def transformed(cls, x: Tensor, codebook: Tensor, beta: float) -> tuple[Tensor, ...]:
        quantized, distances, indices = _vector_quantize(x.detach(), codebook.detach())
        rows, chosen = wide(x).movedim(1, -1), wide(codebook)[indices]
        pulls = beta * (rows - chosen.detach()).square().sum(-1)
        pushes = (rows.detach() - chosen).square().sum(-1)
        # Numbers of the operator, derivatives of these: what is subtracted from itself has no more.
        distances = distances + (pulls - pulls.detach()) + (pushes - pushes.detach())
        return quantized + (x - x.detach()), distances, indices
