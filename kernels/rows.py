"""Tensors as rows of their last dimension."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def load(ptr, row, stride, at, mask):
    """Elements of a row as fp32; zeros where the mask is not."""
    return tl.load(ptr + row * stride + at, mask, 0.0).to(tl.float32)


def as_rows(x: Tensor) -> Tensor:
    """x as (rows, width): rows that lie one stride apart stay where they are, others are copied."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def with_dense_rows(x: Tensor) -> Tensor:
    """x with its last dimension contiguous, the others of any strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def tile(rows: int, width: int, elements: int) -> dict[str, int]:
    """ROWS x BLOCK of about that many elements, 8 of them a thread."""
    block = min(triton.next_power_of_2(width), elements)
    tile_rows = min(elements // block, triton.next_power_of_2(rows))
    warps = max(1, min(16, block * tile_rows // 256))
    return {"ROWS": tile_rows, "BLOCK": block, "num_warps": warps}
