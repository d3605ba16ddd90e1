"""Tensors as rows of their last dimension."""

import triton
from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """x as (rows, width): rows that lie one stride apart stay where they are, others are copied."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def tile(rows: int, width: int, elements: int) -> dict[str, int]:
    """ROWS x BLOCK of about that many elements, 8 of them a thread."""
    block = min(triton.next_power_of_2(width), elements)
    tile_rows = min(elements // block, triton.next_power_of_2(rows))
    warps = max(1, min(16, block * tile_rows // 256))
    return {"ROWS": tile_rows, "BLOCK": block, "num_warps": warps}
