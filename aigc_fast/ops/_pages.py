"""Caches in pages: entry j of a sequence is slot j % page_size of its page j // page_size."""

import torch
from torch import Tensor

from aigc_fast.ops._checks import check_device, check_tensor

#: what caches may hold beside the dtype of the tokens
NARROW = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


def capacity_of(cache: Tensor, block_table: Tensor | None) -> int:
    """Entries that a sequence has room for in (batch, capacity, ...) or (pages, page_size, ...)."""
    return cache.shape[1] if block_table is None else block_table.shape[1] * cache.shape[1]


def check_block_table(
    block_table: Tensor, of: tuple[str, Tensor], cache: tuple[str, Tensor]
) -> None:
    """The table's shape and dtype. of, cache: (name, tensor) with the batch; with the pages."""
    check_tensor("block_table", block_table, dtypes=(torch.int32,), ndim=2)
    batch, shape = of[1].shape[0], tuple(cache[1].shape)
    if block_table.shape[0] != batch:
        raise ValueError(
            f"block_table must have the batch of {of[0]}, {batch}, got {block_table.shape[0]}"
        )
    if shape[0] == 0 or shape[1] == 0:
        raise ValueError(f"{cache[0]} must have at least one page, got shape {shape}")
    check_device("block_table", block_table, of)


def check_pages(block_table: Tensor, used: Tensor, num_pages: int) -> None:
    """Reads the entries of the table where `used`, of its shape."""
    bad = used & ((block_table < 0) | (block_table >= num_pages))
    for sequence, page in bad.nonzero()[:1].tolist():
        raise ValueError(
            f"block_table must be in [0, {num_pages}) where keys are valid, "
            f"got {block_table[sequence, page]} for page {page} of sequence {sequence}"
        )
