"""The activations of bias_act and norm_act, by their numbers in aigc_fast/ops/_activations.py."""

import triton
import triton.language as tl

from .math import expm1, softplus, tanh


@triton.jit
def activate(x, alpha, ACT: tl.constexpr):
    if ACT == 1:
        return tl.where(x < 0, 0.0, x)
    elif ACT == 2:
        return tl.where(x < 0, x * alpha, x)
    elif ACT == 3:
        return tanh(x)
    elif ACT == 4:
        return tl.sigmoid(x)
    elif ACT == 5:
        return tl.where(x < 0, alpha * expm1(x), x)
    elif ACT == 6:
        return 1.0507009873554805 * tl.where(x < 0, 1.6732632423543772 * expm1(x), x)
    elif ACT == 7:
        return softplus(x)
    elif ACT == 8:
        return x * tl.sigmoid(x)
    else:
        return x


@triton.jit
def slope(x, alpha, ACT: tl.constexpr):
    if ACT == 1:
        return tl.where(x > 0, 1.0, 0.0)
    elif ACT == 2:
        return tl.where(x > 0, 1.0, alpha)
    elif ACT == 3:
        # 4 e / (1 + e)^2: 1 - y * y cancels where tanh saturates.
        e = tl.exp(-2.0 * tl.abs(x))
        return 4.0 * e / ((1.0 + e) * (1.0 + e))
    elif ACT == 4:
        return tl.sigmoid(x) * tl.sigmoid(-x)
    elif ACT == 5:
        return tl.where(x > 0, 1.0, alpha * tl.exp(tl.minimum(x, 0.0)))
    elif ACT == 6:
        e = 1.6732632423543772 * tl.exp(tl.minimum(x, 0.0))
        return 1.0507009873554805 * tl.where(x > 0, 1.0, e)
    elif ACT == 7:
        return tl.sigmoid(x)
    elif ACT == 8:
        return tl.sigmoid(x) * (1.0 + x * tl.sigmoid(-x))
    else:
        return tl.where(x == x, 1.0, 1.0)


@triton.jit
def curvature(x, alpha, ACT: tl.constexpr):
    if ACT == 3:
        return -2.0 * tanh(x) * slope(x, alpha, ACT)
    elif ACT == 4:
        return tl.sigmoid(x) * tl.sigmoid(-x) * (1.0 - 2.0 * tl.sigmoid(x))
    elif ACT == 5:
        return tl.where(x > 0, 0.0, alpha * tl.exp(tl.minimum(x, 0.0)))
    elif ACT == 6:
        e = 1.7580993408473766 * tl.exp(tl.minimum(x, 0.0))
        return tl.where(x > 0, 0.0, e)
    elif ACT == 7:
        return tl.sigmoid(x) * tl.sigmoid(-x)
    elif ACT == 8:
        s, rest = tl.sigmoid(x), tl.sigmoid(-x)
        return s * rest * (2.0 + x * (rest - s))
    else:
        return x * 0.0
