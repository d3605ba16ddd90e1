"""gelu alone, whose tanh form takes torch long on CPUs."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aigc_fast.ops._autograd import OpFunction, transforming, wanted
from aigc_fast.ops._checks import check_tensor, plain_on_cpu
from aigc_fast.ops._registry import FLOATS, define
from aigc_fast.ops.gated_mlp import _slope


def gelu(x: Tensor, approximate: str = "none", *, inplace: bool = False) -> Tensor:
    """y = gelu(x), as torch.nn.functional.gelu: same arguments, results and errors.

    x:           any shape.
    approximate: "none" is x * Phi(x), Phi the standard normal distribution; "tanh" is
                 x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))) / 2.
    inplace:     y takes the place of x, and is x: half the memory that must be found, which of
                 large tensors is most of the time. RuntimeError where x wants a gradient.

    The tanh form of a contiguous tensor on a CPU is an operator of ours, 1.4 to 10 times as fast
    and in place up to 19, and so is its gradient; the derivative of that is torch's. Computes in
    fp32 (fp64 for fp64) and rounds once. Everywhere else, within torch.compile and torch.func it
    is torch's own function.

    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415.
    """
    if inplace and wanted(x):
        raise RuntimeError("gelu: inplace=True, but x wants a gradient, which needs its values")
    if (
        approximate != "tanh"
        or torch.compiler.is_compiling()
        or not plain_on_cpu((x,), FLOATS)
        or not x.is_contiguous()
        or transforming()
    ):
        if inplace:
            return torch.ops.aten.gelu_(x, approximate=approximate)
        return F.gelu(x, approximate=approximate)
    if inplace:
        _gelu_tanh_(x)
        return x
    return _Gelu.call(x) if wanted(x) else _gelu_tanh(x)


def _reference(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _reference_(x: Tensor) -> None:
    x.copy_(_reference(x))


def _reference_backward(dy: Tensor, x: Tensor) -> Tensor:
    return dy * _slope(x, True)


def _check(x: Tensor) -> None:
    check_tensor("x", x)


def _check_backward(dy: Tensor, x: Tensor) -> None:
    check_tensor("x", x)
    check_tensor("grad_output", dy, like=("x", x), shape=x.shape)


_gelu_tanh = define("gelu_tanh(Tensor x) -> Tensor", _reference, _check, stem=None)
_gelu_tanh_ = define("gelu_tanh_(Tensor(a!) x) -> ()", _reference_, _check, stem=None)
_gelu_tanh_backward = define(
    "gelu_tanh_backward(Tensor grad_output, Tensor x) -> Tensor",
    _reference_backward,
    _check_backward,
    stem=None,
)


class _Gelu(OpFunction):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _gelu_tanh(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        # The reference is made of differentiable operations: higher derivatives are torch's own.
        return _reference_backward(dy, x) if torch.is_grad_enabled() else _gelu_tanh_backward(dy, x)
