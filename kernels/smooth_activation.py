"""The smooth activations that follow a norm or open a gate: 0 silu, 1 gelu, 2 gelu's tanh form."""

import triton
import triton.language as tl

from .math import normal


@triton.jit
def activate(x, ACT: tl.constexpr):
    """act(x) and its derivative."""
    if ACT == 1:
        density, cumulative = normal(x)
        return x * cumulative, cumulative + x * density
    else:
        # gelu's (1 + tanh(u)) / 2 is sigmoid(2 u); sqrt(8 / pi) = 1.5957691216057308
        if ACT == 2:
            u = 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)
            du = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        else:
            u = x
            du = 1.0
        s = tl.sigmoid(u)
        return x * s, s * (1.0 + x * du * (1.0 - s))
