"""Tensors that are walked in the order of their memory, whatever that of their dimensions."""

import torch
from torch import Tensor


def is_dense(x: Tensor) -> bool:
    """Whether the elements fill their memory without gaps, in any order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def dense(x: Tensor) -> Tensor:
    return x if is_dense(x) else x.contiguous()


def contiguous_like(x: Tensor) -> Tensor:
    """New memory for a result of its shape and dtype."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def in_order_of(x: Tensor, like: Tensor) -> Tensor:
    return x if x.stride() == like.stride() else torch.empty_like(like).copy_(x)
