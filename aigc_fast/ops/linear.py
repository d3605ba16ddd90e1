"""Dense products, where torch's own library leaves half of a processor unused."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aigc_fast import _libraries
from aigc_fast.ops._autograd import OpFunction, asked_for, transforming
from aigc_fast.ops._checks import check_tensor, plain_on_cpu
from aigc_fast.ops._registry import define

#: Multiply-adds from which our call's few us are worth it, rows of x from which packing the weight
#: is, and columns that fill a vector.
_LEAST = 3 * 2**19
_ROWS = 2
_COLUMNS = 16
_DTYPES = (torch.float32,)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x @ weight.T + bias, as torch.nn.functional.linear: same arguments, results and errors.

    x:      (..., in_features).
    weight: (out_features, in_features).
    bias:   (out_features,) or None.

    torch leaves float32 products on x86 to MKL, which on processors that are not Intel's does not
    use AVX-512. There this function multiplies by a kernel of its own, about twice as fast,
    gradients' products too: of two rows of x and more, from a million and a half multiply-adds on.
    Everywhere else, in other dtypes, under autocast, within torch.compile, torch.func and
    forward-mode derivatives it is torch's own function. Differentiable as often as one likes.
    """
    if torch.compiler.is_compiling() or not _is_ours(x, weight, bias):
        return F.linear(x, weight, bias)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y = (_Linear.call if torch.is_grad_enabled() else _product)(rows, weight, bias)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], weight.shape[0])


def _is_ours(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        mkl_lags()
        and x.shape[-1:] == weight.shape[1:]
        and x.numel() * weight.shape[0] >= _LEAST
        and x.numel() >= _ROWS * x.shape[-1]
        and weight.shape[0] >= _COLUMNS
        and (bias is None or bias.shape == weight.shape[:1])
        and plain_on_cpu((x, weight, bias), _DTYPES)
        and not torch.is_autocast_enabled("cpu")
        and not transforming()
        and torch._C._get_tracing_state() is None  # what torch.jit records runs elsewhere too
    )


@functools.cache
def mkl_lags() -> bool:
    """Whether torch's products come from MKL on a processor for which MKL has older code."""
    features = _libraries.features()
    ours = "cpu" in _libraries.loaded and _libraries.loaded["cpu"].stem == "cpu_avx512"
    return ours and not features["intel"] and torch.backends.mkl.is_available()


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_tensor("x", x, ndim=2)
    check_tensor("weight", weight, ndim=2, like=("x", x))
    if weight.shape[1] != x.shape[1] or x.shape[1] == 0:
        raise ValueError(f"weight must have shape (out_features, {x.shape[1]} > 0)")
    if bias is not None:
        shape = (weight.shape[0],)
        check_tensor("bias", bias, shape=shape, like=("x", x))


_product = define(
    "linear_product(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    F.linear,
    _check,
    stem=None,
    dtypes=_DTYPES,
)


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
