"""Dense products, where torch's own library leaves half of a processor unused."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aigc_fast import _libraries
from aigc_fast._devices import has_bfloat16_instructions, has_fast_bfloat16, torch_multiplies
from aigc_fast.ops._autograd import OpFunction, asked_for, transforming
from aigc_fast.ops._checks import check_tensor, plain_on_cpu
from aigc_fast.ops._registry import define, forced

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Columns that fill a vector.
_COLUMNS = 16
#: Rows that are multiplied at once without packing the weight.
_FEW_ROWS = 4


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x @ weight.T + bias, as torch.nn.functional.linear: same arguments, results and errors.

    x:      (..., in_features).
    weight: (out_features, in_features).
    bias:   (out_features,) or None.

    Where torch's products are slow this function multiplies by a kernel of its own, gradients too,
    from some hundred thousand multiply-adds on. These are float32 ones on processors with AVX-512
    that are not Intel's, for which torch asks an MKL that does not use it (half of our speed, for
    a few rows a third), and those of float16 and bfloat16 where the processor has no instructions
    that torch would use (an eighth). Of bfloat16 where these are of vectors, not of matrices (no
    AMX), it multiplies from 8,192 multiply-adds on, but for the gradients of weights: a few rows
    1.5 to 3 times as fast as torch, hundreds 1.0 to 1.25. A few rows read the weight once, as fast
    as memory gives it.
    Everywhere else, under autocast, within torch.compile, torch.func and forward-mode derivatives
    it is torch's own function. Differentiable as often as one likes.
    """
    if torch.compiler.is_compiling() or not _is_ours(x, weight, bias):
        return _torchs(x, weight, bias)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y = (_Linear.call if torch.is_grad_enabled() else _product)(rows, weight, bias)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], weight.shape[0])


def _torchs(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.is_contiguous() or x.dim() < 3:
        return F.linear(x, weight, bias)
    # Rows with gaps torch would copy too, and then add the bias in a pass of its own.
    return F.linear(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])


def _is_ours(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        lags(x.dtype)
        and x.shape[-1:] == weight.shape[1:]
        and _is_large(x, weight)
        and (bias is None or bias.shape == weight.shape[:1])
        and plain_on_cpu((x, weight, bias), (x.dtype,))
        and not torch.is_autocast_enabled("cpu")
        and not transforming()
        and forced() not in ("triton", "cuda")  # which have none, so that it is torch's there too
        and torch._C._get_tracing_state() is None  # what torch.jit records runs elsewhere too
    )


def _is_large(x: Tensor, weight: Tensor) -> bool:
    """Whether the product is worth our call's few us, and packing the weight where it is packed."""
    columns = weight.shape[0]
    work, wide, in_order = x.numel() * columns, x.dtype == torch.float32, x.stride(-1) == 1
    if columns < _COLUMNS or work == 0:
        return False
    if _by_dots(x.dtype):  # not columns of x, as for a weight's gradient: torch's are as fast there
        return work >= 2**13 and in_order
    rows = x.numel() // x.shape[-1]
    if not in_order or weight.stride(-1) != 1:  # a few rows need no packing but for that
        return work >= 3 * 2**19 and rows >= (2 if wide else 4)
    return work >= (2**17 if not wide else 2**18 if rows <= _FEW_ROWS else 3 * 2**18)


@functools.cache
def lags(dtype: torch.dtype) -> bool:
    """Whether torch's products of this dtype take longer than ours on this CPU."""
    if dtype == torch.float32:
        return mkl_lags()
    slow = _libraries.loaded_level() in ("avx512", "avx2") and not torch_multiplies(dtype)
    return slow or _by_dots(dtype)


@functools.cache
def _by_dots(dtype: torch.dtype) -> bool:
    """Whether our products of bfloat16 take its vector instructions, and torch's no matrix unit."""
    ours = _libraries.loaded_level() == "avx512" and has_bfloat16_instructions()
    return dtype == torch.bfloat16 and ours and not has_fast_bfloat16("cpu")


@functools.cache
def mkl_lags() -> bool:
    """Whether torch's products come from an MKL that leaves AVX-512 unused, and ours do not."""
    ours = _libraries.loaded_level() == "avx512" and not _libraries.features()["intel"]
    return ours and torch.backends.mkl.is_available()


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_tensor("x", x, ndim=2)
    check_tensor("weight", weight, ndim=2, like=("x", x))
    if weight.shape[1] != x.shape[1] or x.shape[1] == 0:
        raise ValueError(f"weight must have shape (out_features, {x.shape[1]} > 0)")
    if bias is not None:
        check_tensor("bias", bias, like=("x", x), shape=weight.shape[:1])


_product = define(
    "linear_product(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    F.linear,
    _check,
    stem=None,
    dtypes=DTYPES,
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
