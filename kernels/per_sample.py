"""Tensors seen as rows, one for each sample of the batch: the launchers' SampleRows of csrc."""

import torch
import triton
import triton.language as tl
from torch import Tensor

#: elements of a row that one program takes
BLOCK = 1024


@triton.jit
def locate(inner, BLOCK: tl.constexpr):
    """This program's row, its first offsets inside the row, their mask."""
    blocks = tl.cdiv(inner, BLOCK)
    pid = tl.program_id(0).to(tl.int64)
    at = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    return pid // blocks, at, at < inner


@triton.jit
def store(ptr, row, inner, at, mask, value):
    tl.store(ptr + row * inner + at, value.to(ptr.dtype.element_ty), mask)


def _inner_strides(x: Tensor) -> list[int]:
    return [s for n, s in zip(x.shape[1:], x.stride()[1:], strict=True) if n != 1]


class Rows:
    """The rows of one call. Results have the strides of torch.empty_like(sample)."""

    def __init__(self, sample: Tensor) -> None:
        self.size, self.batch = sample.numel(), sample.shape[0] if sample.dim() else 1
        self.inner = self.size // max(self.batch, 1)
        self._out = torch.empty_like(sample)
        outermost = self.batch <= 1 or self._out.stride(0) == self.inner
        self._order = self._out if outermost else torch.empty_like(
            sample, memory_format=torch.contiguous_format
        )  # fmt: skip

    @property
    def grid(self) -> tuple[int]:
        return (self.batch * triton.cdiv(self.inner, BLOCK),)

    def arrange(self, x: Tensor | None) -> Tensor | None:
        """x, or a copy of it, such that its samples lie as those of the results."""
        if x is None or _inner_strides(x) == _inner_strides(self._order):
            return x
        return torch.empty_like(self._order, dtype=x.dtype).copy_(x)

    def dense(self, x: Tensor) -> Tensor:
        """Like arrange, and with no gaps between samples."""
        x = self.arrange(x)
        if self.batch <= 1 or x.stride(0) == self.inner:
            return x
        return torch.empty_like(self._order, dtype=x.dtype).copy_(x)

    def strides(self, *tensors: Tensor | None, per_sample: bool) -> list[int]:
        """Elements from one sample to the next in each tensor. Where nothing differs from sample
        to sample, a batch without gaps becomes one long row."""
        strides = [x.stride(0) if x is not None and x.dim() else self.inner for x in tensors]
        if not per_sample and all(stride == self.inner for stride in strides):
            self.batch, self.inner = 1, self.size
        return strides

    def result(self) -> Tensor:
        return torch.empty_like(self._order)

    def finish(self, results: list[Tensor]) -> list[Tensor]:
        if self._order is self._out:
            return results
        return [torch.empty_like(self._out).copy_(x) for x in results]
