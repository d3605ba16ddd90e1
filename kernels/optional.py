"""Tensors that a call may leave out; in a kernel they are None, which decides what is compiled."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def value_or(ptr, at, mask, missing: tl.constexpr):
    """Values in fp32; without a tensor that one everywhere."""
    if ptr is None:
        return tl.where(mask, missing, missing)
    else:
        return tl.load(ptr + at, mask, 0.0).to(tl.float32)


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]
