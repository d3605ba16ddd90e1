"""Dense products, by the library that does them best on this processor."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aigc_fast import _libraries
from aigc_fast.ops._autograd import OpFunction, asked_for, transforming
from aigc_fast.ops._layout import transposed_copy

#: Multiply-adds from which oneDNN's 10 us a call are worth it.
_LEAST = 2**22
#: Terms of a sum at most. In chains of 512, as oneDNN takes them, sums are 1.7 times as wrong as
#: MKL's in the mean and up to 2.4 times at worst; in pieces of 384 1.3 and 1.5 times.
_TERMS = 384
#: Rows of x from which a weight that has more is worth the copy of its pieces.
_ROWS = 32
#: Elements copied at a time: where these take more, each copy is new memory, four times as slow.
_COPY = 2**21


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x @ weight.T + bias, as torch.nn.functional.linear: same arguments, results and errors.

    x:      (..., in_features).
    weight: (out_features, in_features).
    bias:   (out_features,) or None.

    torch leaves float32 products on x86 to MKL, which on processors that are not Intel's does not
    use AVX-512: oneDNN, which torch has too, is about twice as fast there. There this function
    asks oneDNN for products of 4 million multiply-adds and more, gradients' too, in pieces of 384
    terms of each sum: more at once would round more than MKL. Pieces are copied, so that longer
    sums take 32 rows of x or more. Everywhere else, in other dtypes, under autocast, within
    torch.compile, torch.func and forward-mode derivatives it is torch's own function.
    Differentiable as often as one likes.
    """
    if torch.compiler.is_compiling() or not _by_onednn(x, weight, bias):
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return _product(x, weight, bias)
    if x.dim() == 2:
        return _Linear.call(x, weight, bias)
    y = _Linear.call(x.reshape(-1, x.shape[-1]), weight, bias)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        mkl_lags()
        and x.shape[-1:] == weight.shape[1:]
        and x.numel() * weight.shape[0] >= _LEAST
        and (x.shape[-1] <= _TERMS or x.numel() >= _ROWS * x.shape[-1])
        and (bias is None or bias.shape == weight.shape[:1])
        and all(
            # Subclasses (sharded, quantised) know F.linear, and not oneDNN's operator.
            type(t) in (Tensor, torch.nn.Parameter)
            and t.dtype is torch.float32
            and t.device.type == "cpu"
            and t.layout is torch.strided
            for t in (x, weight, x if bias is None else bias)
        )
        and not torch.is_autocast_enabled("cpu")
        and not transforming()
        and torch._C._get_mkldnn_enabled()
        and torch._C._get_tracing_state() is None  # torch.jit cannot record oneDNN's operator
    )


@functools.cache
def mkl_lags() -> bool:
    """Whether torch's products come from MKL on a processor for which MKL has older code."""
    features = _libraries.features()
    avx512 = all(features.get(name) for name in _libraries.CPU_LEVELS["avx512"])
    built = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return avx512 and not features["intel"] and built


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In pieces of at most _TERMS terms of each sum, which oneDNN adds up in one chain."""
    pieces = -(-x.shape[-1] // _TERMS)
    if pieces == 1:
        return _piece(x, weight, bias)
    some = _COPY * pieces // x.shape[-1]
    parts = x.tensor_split(pieces, -1)
    return _side_by_side(
        [
            _sum_of_pieces(parts, rows.tensor_split(pieces, -1), part_of_bias)
            for rows, part_of_bias in zip(
                weight.split(some),
                itertools.repeat(None) if bias is None else bias.split(some),
                strict=False,
            )
        ]
    )


def _sum_of_pieces(x: Sequence[Tensor], weight: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    y = _piece(x[0], weight[0], bias)
    for part, piece in zip(x[1:], weight[1:], strict=True):
        y += _piece(part, piece)
    return y


def _side_by_side(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _piece(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # With gaps between its rows oneDNN takes a hundred times as long.
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()
    # It would copy x itself, in twice the time or more: weights' gradients have such an x.
    if x.dim() == 2 and not x.is_contiguous() and x.t().is_contiguous():
        x = transposed_copy(x)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(OpFunction):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        by_x, by_weight, by_bias = asked_for(ctx)
        return (
            linear(grad, weight.t()) if by_x else None,
            linear(grad.t(), x.t()) if by_weight else None,
            grad.sum(0) if by_bias else None,
        )
