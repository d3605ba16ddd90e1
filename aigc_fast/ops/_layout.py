"""What references share: the dtype they compute in, and the memory order of their results."""

import torch
from torch import Tensor

from aigc_fast.ops._autograd import transforming
from aigc_fast.ops._checks import check_tensor
from aigc_fast.ops._registry import define

#: A contiguous copy of a channels_last image; torch's own takes 2 to 10 times as long.
to_planes = define(
    "to_planes(Tensor x) -> Tensor",
    lambda x: x.clone(memory_format=torch.contiguous_format),
    lambda x: check_tensor("x", x, ndim=4),
    stem=None,
)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """That of the arithmetic: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """x in the dtype of the arithmetic."""
    return x.to(wide_dtype(x.dtype))


def order_of(x: Tensor) -> torch.memory_format:
    """channels_last (or channels_last_3d) where x is that and not contiguous too, else contiguous.
    So it is within torch.func, where tensors cannot say it."""
    if not transforming() and not x.is_contiguous():
        for dim, order in ((4, torch.channels_last), (5, torch.channels_last_3d)):
            if x.dim() == dim and x.is_contiguous(memory_format=order):
                return order
    return torch.contiguous_format


def in_order_of(y: Tensor, x: Tensor) -> Tensor:
    """y in the dtype of x, channels_last (or channels_last_3d) where x is, else contiguous."""
    if transforming():  # where x may be one for a batch of y
        return y.to(x.dtype)
    return torch.empty_like(x, memory_format=order_of(x)).copy_(y)


def strided_as(y: Tensor, x: Tensor) -> Tensor:
    """y, which may be spread to the shape of x, in the dtype and memory order of x."""
    if transforming():
        return y.to(x.dtype).expand(x.shape)
    return torch.empty_like(x).copy_(y)


def channels_last(x: Tensor) -> Tensor:
    """x in that memory order, if it can be told."""
    return x if transforming() else x.contiguous(memory_format=torch.channels_last)


def is_channels_innermost(x: Tensor) -> bool:
    """Whether x, (batch, channels, time), lies in memory as (batch, time, channels) alone."""
    return not x.is_contiguous() and x.transpose(1, 2).is_contiguous()


def channels_innermost(x: Tensor) -> Tensor:
    """x, (batch, channels, time), in memory as (batch, time, channels)."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)
