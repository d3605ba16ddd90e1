"""Tiles of (batch, channels, positions), contiguous or channels_last: a sample is channels x
positions, at strides that tell the two apart, and a program takes BLOCK_C x BLOCK_P of it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096
_PROGRAMS = 1024  # that fill the largest GPUs
_CHANNELS = 32  # of a tile in channels_last


@triton.jit
def tile(channels, pieces, BLOCK_C: tl.constexpr):
    """This program's sample, channels (as a column) and piece."""
    across = tl.cdiv(channels, BLOCK_C)
    pid = tl.program_id(0).to(tl.int64)
    channel = pid // pieces % across * BLOCK_C + tl.arange(0, BLOCK_C)
    return pid // pieces // across, channel[:, None], pid % pieces


def ordered(x: Tensor) -> Tensor:
    """x where it is contiguous or channels_last, else a contiguous copy."""
    for dim, order in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == dim and x.is_contiguous(memory_format=order):
            return x
    return x.contiguous()


class Layout:
    """Where the elements of a call lie, and the tiles that its passes take."""

    def __init__(self, x: Tensor, num_groups: int) -> None:
        self.batch, self.channels = x.shape[:2]
        self.groups, self.width = num_groups, self.channels // num_groups
        self.positions = x.shape[2:].numel()
        last = not x.is_contiguous()
        self.strides = (1, self.channels) if last else (self.positions, 1)
        wanted = _CHANNELS if last else triton.cdiv(_TILE, triton.next_power_of_2(self.positions))
        self.block_c = min(triton.next_power_of_2(self.channels), wanted)
        self.block_p = min(triton.next_power_of_2(self.positions), max(_TILE // self.block_c, 1))
        across = self.batch * triton.cdiv(self.channels, self.block_c)
        # Pieces for a pass that sums: as many as fill the machine.
        self.tiles = triton.cdiv(self.positions, self.block_p)
        run = triton.cdiv(self.tiles, max(triton.cdiv(_PROGRAMS, across), 1))
        self.piece_size = run * self.block_p
        self.pieces = triton.cdiv(self.positions, self.piece_size)
        self.sums_grid, self.map_grid = (across * self.pieces,), (across * self.tiles,)
        warps = max(1, min(8, self.block_c * self.block_p // 512))
        self.blocks = {"BLOCK_C": self.block_c, "BLOCK_P": self.block_p, "num_warps": warps}
