"""Spectral normalisation of all weights of a network in one call."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aigc_fast.ops._autograd import OpFunction
from aigc_fast.ops._checks import check_tensor
from aigc_fast.ops._layout import wide
from aigc_fast.ops._registry import define


def spectral_norm(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    iterations: int = 1,
    eps: float = 1e-12,
) -> tuple[list[Tensor], Tensor, list[Tensor], list[Tensor]]:
    """(weights / sigma, sigma, new u, new v): each weight divided by its largest singular value.

    weights:    tensors (out, ...) of one dtype, float64/32/16 or bfloat16, each a matrix of out
                rows. Contiguous; others are copied once.
    u, v:       for each weight the estimates (rows,) and (columns,) of its first singular vectors,
                of length 1, in its dtype. They are read, not written: what earlier calls returned
                stays valid for their derivatives. The new ones are views of one tensor.
    iterations: of v = W'u / max(|W'u|, eps), u = Wv / max(|Wv|, eps). 0 takes u and v as they are.

    sigma (number of weights,) is u . W v. Computes in fp32 (fp64 for fp64). Differentiable in
    weights as often as one likes, with u and v as constants, as the paper has it. Bytes that must
    move: forward 2, backward 3 times the weights, where each of them fits a core's cache.

    Raises TypeError or ValueError for a wrong dtype, shape, device or number of tensors.

    Source: Miyato et al. 2018, arXiv:1802.05957.
    """
    weights, u, v = list(weights), list(u), list(v)
    if torch.is_grad_enabled() and any(w.requires_grad for w in weights):
        *normal, sigma, vectors = _SpectralNormFunction.call(u, v, iterations, eps, *weights)
    else:
        normal, sigma, vectors = _spectral_norm(weights, u, v, iterations, eps)
    return normal, sigma, *_split(vectors, weights)


def _split(vectors: Tensor, weights: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """(u, v) of each weight, which lie in one tensor: every u, then every v."""
    rows = [w.shape[0] for w in weights]
    columns = [w.numel() // n for w, n in zip(weights, rows, strict=True)]
    parts = list(vectors.split([*rows, *columns]))
    return parts[: len(rows)], parts[len(rows) :]


def _normalized(x: Tensor, eps: float) -> Tensor:
    return x / x.norm().clamp_min(eps)


def _sigmas(weights: Sequence[Tensor], u: Sequence[Tensor], v: Sequence[Tensor]) -> list[Tensor]:
    """u . W v of every weight, in fp32 or fp64."""
    return [wide(a) @ (wide(w).flatten(1) @ wide(b)) for w, a, b in zip(weights, u, v, strict=True)]


def _reference(
    weights: list[Tensor], u: list[Tensor], v: list[Tensor], iterations: int, eps: float
) -> tuple[list[Tensor], Tensor, Tensor]:
    new_u, new_v = [wide(a).clone() for a in u], [wide(b).clone() for b in v]
    for i, w in enumerate(weights):
        matrix = wide(w).flatten(1).detach()  # u and v are constants
        for _ in range(iterations):
            new_v[i] = _normalized(matrix.t() @ new_u[i], eps)
            new_u[i] = _normalized(matrix @ new_v[i], eps)
    dtype = weights[0].dtype
    sigmas = _sigmas(weights, new_u, new_v)
    normal = [(wide(w) / s).to(dtype).contiguous() for w, s in zip(weights, sigmas, strict=True)]
    return normal, torch.stack(sigmas).to(dtype), torch.cat([*new_u, *new_v]).to(dtype)


def _reference_backward(
    grads: list[Tensor], grad_sigma: Tensor, weights: list[Tensor], vectors: Tensor,
    sigma: Sequence[Tensor] | Tensor,
) -> list[Tensor]:  # fmt: skip
    found = []
    rows = zip(grads, wide(grad_sigma), weights, *_split(vectors, weights), sigma, strict=True)
    for grad, ds, w, a, b, s in rows:
        g, s = wide(grad), wide(s)
        factor = ds - (g * wide(w)).sum() / s.square()
        outer = torch.outer(wide(a), wide(b)).reshape(w.shape)
        found.append((g / s + factor * outer).to(w.dtype).contiguous())
    return found


def _check(
    weights: list[Tensor], u: list[Tensor], v: list[Tensor], iterations: int, eps: float
) -> None:
    if not weights:
        raise ValueError("weights must not be empty")
    for name, vectors in (("u", u), ("v", v)):
        if len(vectors) != len(weights):
            raise ValueError(f"{name} must have {len(weights)} tensors, got {len(vectors)}")
    for i, (w, a, b) in enumerate(zip(weights, u, v, strict=True)):
        name, first = f"weights[{i}]", None if i == 0 else ("weights[0]", weights[0])
        check_tensor(name, w, like=first)
        if w.dim() < 2 or w.numel() == 0:
            raise ValueError(
                f"{name} must have at least 2 dimensions, and elements, got {tuple(w.shape)}"
            )
        check_tensor(f"u[{i}]", a, like=(name, w), shape=w.shape[:1])
        check_tensor(f"v[{i}]", b, like=(name, w), shape=(w.shape[1:].numel(),))
    if iterations < 0:
        raise ValueError(f"iterations must be at least 0, got {iterations}")


def _check_backward(
    grads: list[Tensor], grad_sigma: Tensor, weights: list[Tensor], vectors: Tensor, sigma: Tensor
) -> None:
    _check(weights, *_split(vectors, weights), 0, 0.0)
    for i, (g, w) in enumerate(zip(grads, weights, strict=True)):
        check_tensor(f"grad_output[{i}]", g, like=("its weight", w), shape=w.shape)
    for name, s in (("grad_sigma", grad_sigma), ("sigma", sigma)):
        check_tensor(name, s, like=("weights[0]", weights[0]), shape=(len(weights),))


_spectral_norm = define(
    "spectral_norm(Tensor[] weights, Tensor[] u, Tensor[] v, int iterations, float eps)"
    " -> (Tensor[], Tensor, Tensor)",
    _reference,
    _check,
    stem="spectral_norm",
)
_backward = define(
    "spectral_norm_backward(Tensor[] grad_output, Tensor grad_sigma, Tensor[] weights,"
    " Tensor vectors, Tensor sigma) -> Tensor[]",
    _reference_backward,
    _check_backward,
    stem="spectral_norm",
)


class _SpectralNormFunction(OpFunction):
    """u and v are constants, and stay in their lists: of a tensor among the arguments autograd
    keeps account, which takes longer than the kernel where layers are small."""

    @staticmethod
    def forward(
        ctx: Any, u: list[Tensor], v: list[Tensor], iterations: int, eps: float, *weights: Tensor
    ) -> tuple:
        normal, sigma, vectors = _spectral_norm(list(weights), u, v, iterations, eps)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(vectors)
        ctx.save_for_backward(*weights, vectors, sigma)
        return *normal, sigma, vectors

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> tuple:
        *weights, vectors, sigma = ctx.saved_tensors
        n = len(weights)
        with_zeros = zip(given[:n], weights, strict=True)
        grads = [torch.zeros_like(w) if g is None else g for g, w in with_zeros]
        ds = torch.zeros_like(sigma) if given[n] is None else given[n]
        run: Any = _backward
        if torch.is_grad_enabled():
            # Made of differentiable operations: higher derivatives are torch's own.
            run, sigma = _reference_backward, _sigmas(weights, *_split(vectors, weights))
        return None, None, None, None, *run(grads, ds, weights, vectors, sigma)
