"""The periodic activation of neural vocoders, with its parameter gradients in the same pass."""

from typing import Any

import torch
from torch import Tensor

from aigc_fast.ops._autograd import OpFunction
from aigc_fast.ops._checks import check_tensor
from aigc_fast.ops._layout import strided_as, wide
from aigc_fast.ops._registry import define

#: what is added to beta before the division, as in BigVGAN and DAC
EPS = 1e-9


def snake(
    x: Tensor, alpha: Tensor, beta: Tensor | None = None, *, log_scale: bool = False
) -> Tensor:
    """y = x + sin(alpha x)^2 / (beta + 1e-9), alpha and beta per channel.

    x:         (batch, channels, ...), float64/32/16 or bfloat16. Its memory order (contiguous,
               channels_last, any permutation) is that of y; a tensor with gaps is copied once.
    alpha:     shape (channels,), dtype of x: the frequency.
    beta:      shape (channels,), dtype of x: the inverse of the amplitude. None: alpha.
    log_scale: alpha and beta are the logarithms of these, as BigVGAN trains them.

    Computes in fp32 (fp64 for fp64) and rounds once; sin is as exact for large arguments as for
    small ones. The gradients of alpha and beta are summed in the same pass, in an order that the
    shape alone decides. Saves x for backward. Bytes that must move: forward 2, backward 3, double
    backward 5 times x.

    Raises TypeError or ValueError for a wrong dtype, shape or device.

    Source: Liu et al. 2020, arXiv:2006.08195; with beta: Lee et al. 2023, arXiv:2206.04658.
    """
    alpha, beta = scales(alpha, beta, log_scale)
    if torch.is_grad_enabled() and (x.requires_grad or alpha.requires_grad or beta.requires_grad):
        return _Snake.call(x, alpha, beta)
    return _snake(x, alpha, beta)


def scales(alpha: Tensor, beta: Tensor | None, log_scale: bool) -> tuple[Tensor, Tensor]:
    """alpha and beta as the kernels take them."""
    if log_scale:
        alpha, beta = alpha.exp(), None if beta is None else beta.exp()
    # A view: torch.compile refuses a Function that gets one tensor twice.
    return alpha, alpha.view_as(alpha) if beta is None else beta


def _parts(x: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x, alpha and 1 / (beta + eps) in the dtype of computing, of shapes that broadcast."""
    over = (1, -1) + (1,) * (x.dim() - 2)
    return wide(x), wide(alpha).view(over), 1 / (wide(beta).view(over) + EPS)


def _sum(x: Tensor, like: Tensor) -> Tensor:
    return x.sum([d for d in range(x.dim()) if d != 1]).to(like.dtype)


def _reference(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    at, a, b = _parts(x, alpha, beta)
    return (at + torch.sin(a * at) ** 2 * b).to(x.dtype)


def reference_backward(
    dy: Tensor, x: Tensor, alpha: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    at, a, b = _parts(x, alpha, beta)
    g, sin_twice = wide(dy), torch.sin(2 * a * at)
    dx = g * (1 + a * b * sin_twice)
    dalpha = _sum(g * at * b * sin_twice, alpha)
    dbeta = _sum(-g * b**2 * torch.sin(a * at) ** 2, beta)
    return strided_as(dx, x), dalpha, dbeta


def _reference_double_backward(
    gg: Tensor, gg_alpha: Tensor, gg_beta: Tensor, dy: Tensor, x: Tensor, alpha: Tensor,
    beta: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    at, a, b = _parts(x, alpha, beta)
    g, w = wide(dy), wide(gg)
    p, q = wide(gg_alpha).view(a.shape) * b, wide(gg_beta).view(a.shape) * b**2
    squared, sin_twice, cos_twice = (
        torch.sin(a * at) ** 2,
        torch.sin(2 * a * at),
        torch.cos(2 * a * at),
    )
    slope = sin_twice + 2 * a * at * cos_twice
    grad_dy = w * (1 + a * b * sin_twice) + p * at * sin_twice - q * squared
    grad_x = g * (2 * a**2 * b * w * cos_twice + p * slope - q * a * sin_twice)
    grad_alpha = g * (w * b * slope + 2 * p * at**2 * cos_twice - q * at * sin_twice)
    grad_beta = g * b * (2 * q * squared - (w * a * b + p * at) * sin_twice)
    return (
        strided_as(grad_dy, x),
        strided_as(grad_x, x),
        _sum(grad_alpha, alpha),
        _sum(grad_beta, beta),
    )


def _check(x: Tensor, alpha: Tensor, beta: Tensor) -> None:
    check_tensor("x", x, min_ndim=2)
    check_tensor("alpha", alpha, like=("x", x), shape=(x.shape[1],))
    check_tensor("beta", beta, like=("x", x), shape=(x.shape[1],))


def _check_backward(dy: Tensor, x: Tensor, alpha: Tensor, beta: Tensor) -> None:
    _check(x, alpha, beta)
    check_tensor("grad_output", dy, like=("x", x), shape=x.shape)


def _check_double_backward(
    gg: Tensor, gg_alpha: Tensor, gg_beta: Tensor, dy: Tensor, *saved: Tensor
) -> None:
    _check_backward(dy, *saved)
    check_tensor("gg", gg, like=("x", saved[0]), shape=saved[0].shape)
    check_tensor("gg_alpha", gg_alpha, like=("x", saved[0]), shape=saved[1].shape)
    check_tensor("gg_beta", gg_beta, like=("x", saved[0]), shape=saved[2].shape)


_snake = define(
    "snake(Tensor x, Tensor alpha, Tensor beta) -> Tensor", _reference, _check, stem="snake"
)
_backward = define(
    "snake_backward(Tensor grad_output, Tensor x, Tensor alpha, Tensor beta)"
    " -> (Tensor, Tensor, Tensor)",
    reference_backward,
    _check_backward,
    stem="snake",
)
_double_backward = define(
    "snake_double_backward(Tensor gg, Tensor gg_alpha, Tensor gg_beta, Tensor grad_output,"
    " Tensor x, Tensor alpha, Tensor beta) -> (Tensor, Tensor, Tensor, Tensor)",
    _reference_double_backward,
    _check_double_backward,
    stem="snake",
)


class _Snake(OpFunction):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        ctx.save_for_backward(x, alpha, beta)
        return _snake(x, alpha, beta)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        run: Any = _SnakeBackward.call if torch.is_grad_enabled() else _backward
        return run(dy, *ctx.saved_tensors)


class _SnakeBackward(OpFunction):
    @staticmethod
    def forward(ctx: Any, dy: Tensor, x: Tensor, alpha: Tensor, beta: Tensor) -> tuple:
        ctx.save_for_backward(dy, x, alpha, beta)
        return _backward(dy, x, alpha, beta)

    @staticmethod
    def backward(ctx: Any, gg: Tensor, gg_alpha: Tensor, gg_beta: Tensor) -> tuple:
        # A third derivative is torch's own, through the reference.
        run: Any = _reference_double_backward if torch.is_grad_enabled() else _double_backward
        return run(gg, gg_alpha, gg_beta, *ctx.saved_tensors)
