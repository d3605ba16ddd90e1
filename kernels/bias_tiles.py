"""Tiles of a dense tensor with a parameter that has one value for each channel.

In memory order the tensor is a matrix: rows that share one value of the parameter (it runs along an
outer dimension), or rows with one value per column (PER_COLUMN: it runs along the innermost). One
program takes a tile of ROWS x COLS; in backward it leaves the tile's part of the parameter's
gradient, and the parts are added in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 1024


@triton.jit
def tile(rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Offsets, mask, row and column numbers of this program's tile."""
    across = tl.cdiv(cols, COLS)
    pid = tl.program_id(0).to(tl.int64)
    row = (pid // across * ROWS + tl.arange(0, ROWS))[:, None]
    col = (pid % across * COLS + tl.arange(0, COLS))[None, :]
    return row * cols + col, (row < rows) & (col < cols), row, col


@triton.jit
def load_bias(bias_ptr, row, col, rows, cols, channels, PER_COLUMN: tl.constexpr):
    if PER_COLUMN:
        return tl.load(bias_ptr + col, col < cols, 0.0).to(tl.float32)
    else:
        return tl.load(bias_ptr + row % channels, row < rows, 0.0).to(tl.float32)


@triton.jit
def store_sums(ptr, v, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr, PER_COLUMN: tl.constexpr):  # fmt: skip  # noqa: E501
    """The tile's sums: ptr is (row tiles, cols) for PER_COLUMN, else (rows, column tiles)."""
    across = tl.cdiv(cols, COLS)
    pid = tl.program_id(0).to(tl.int64)
    if PER_COLUMN:
        col = pid % across * COLS + tl.arange(0, COLS)
        tl.store(ptr + pid // across * cols + col, tl.sum(v, 0), col < cols)
    else:
        row = pid // across * ROWS + tl.arange(0, ROWS)
        tl.store(ptr + row * across + pid % across, tl.sum(v, 1), row < rows)


class Tiling:
    """How a dense tensor is cut into tiles, and where the partial bias gradients go."""

    def __init__(self, x: Tensor, bias: Tensor | None, dim: int) -> None:
        size = x.numel()
        self.channels = 1 if bias is None else x.shape[dim]
        inner = size if self.channels <= 1 else x.stride(dim)
        if bias is None:  # any shape will do: long rows
            inner = _TILE if size % _TILE == 0 else size
        self.per_column = self.channels > 1 and inner == 1
        self.cols = self.channels if self.per_column else max(inner, 1)
        self.rows = size // max(self.cols, 1)
        tile_cols = min(triton.next_power_of_2(self.cols), _TILE)
        tile_rows = max(_TILE // tile_cols, 1)
        self.down = triton.cdiv(self.rows, tile_rows)
        self.across = triton.cdiv(self.cols, tile_cols)
        self.grid = (self.down * self.across,)
        self.matrix = (self.rows, self.cols, self.channels)
        self.tile = {"PER_COLUMN": self.per_column, "ROWS": tile_rows, "COLS": tile_cols}

    def partial_sums(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None:
            return x.new_empty(0, dtype=torch.float32)
        shape = (self.down, self.cols) if self.per_column else (self.rows, self.across)
        return x.new_empty(shape, dtype=torch.float32)

    def bias_grad(self, partial: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None:
            return x.new_empty(0)
        if self.per_column:
            return partial.sum(0, dtype=torch.float64).to(x.dtype)
        of_channels = partial.view(-1, self.channels, self.across)
        return of_channels.sum((0, 2), dtype=torch.float64).to(x.dtype)
