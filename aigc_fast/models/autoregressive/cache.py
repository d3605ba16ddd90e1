"""Keys and values of the tokens a decoder has seen."""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

from aigc_fast.ops._pages import NARROW

from .arguments import count
from .cache_scales import check_scales
from .config import DecoderConfig

CACHE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, *NARROW)


def allocate(
    config: DecoderConfig, rows: int, slots: int, dtype: torch.dtype, device: torch.device | str
) -> list[Tensor]:
    """Keys and values of each layer in turn, (rows, slots, num_kv_heads, head_dim).

    On a CPU a page of memory is taken when it is first written to, so that a cache costs what is
    used of it.
    """
    shape = (rows, slots, config.num_kv_heads, config.head_dim)
    # Zeros, not empty: a masked NaN times a weight of zero would still be NaN.
    zeros = _untouched_zeros if torch.device(device).type == "cpu" else torch.zeros
    return [zeros(shape, dtype=dtype, device=device) for _ in range(2 * config.num_layers)]


def _untouched_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: object) -> Tensor:
    """torch.zeros writes to all of them at once."""
    size = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class KVCache:
    """Preallocated keys and values for a batch of sequences.

    Attributes:
        in_turn: keys and values of each layer in turn, (batch, capacity, num_kv_heads, head_dim);
            with a block_table (num_pages, page_size, num_kv_heads, head_dim).
        keys, values: those of each layer.
        block_table: None, or int32 (batch, pages): the pages of each sequence, in order.
        scales: None, or float32 (2 * num_layers, num_kv_heads): what the numbers of each head of
            `in_turn` are to be multiplied by.
        lengths: int32 (batch,), the valid entries of each sequence. It may be lowered, to drop the
            newest tokens.
        longest: the most tokens that a sequence may reach, by which LongRoPE chooses frequencies.
        used: at least the largest of `lengths`, kept on the host so that checking for room does
            not wait for the device.
    """

    def __init__(
        self,
        in_turn: list[Tensor],
        lengths: Tensor,
        *,
        used: int = 0,
        block_table: Tensor | None = None,
        scales: Tensor | None = None,
        longest: int | None = None,
    ) -> None:
        self.in_turn, self.keys, self.values = in_turn, in_turn[::2], in_turn[1::2]
        self.lengths, self.used, self.block_table = lengths, used, block_table
        self.scales = scales
        self.batch_size, self.capacity = len(lengths), in_turn[0].shape[1]
        if block_table is not None:
            self.capacity *= block_table.shape[1]
        self.longest = self.capacity if longest is None else longest

    @classmethod
    def empty(
        cls,
        config: DecoderConfig,
        batch_size: int,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        scales: Tensor | None = None,
    ) -> KVCache:
        """A cache for `batch_size` sequences of at most `capacity` tokens."""
        batch_size, capacity = count("batch_size", batch_size), count("capacity", capacity)
        if dtype not in CACHE_DTYPES:
            raise TypeError(f"dtype must be one of {CACHE_DTYPES}, got {dtype}")
        if not 1 <= capacity <= config.max_position_embeddings:
            raise ValueError(
                f"capacity must be 1 to max_position_embeddings = "
                f"{config.max_position_embeddings}, got {capacity}"
            )
        check_scales("scales", scales, config, dtype)
        lengths = torch.zeros(batch_size, dtype=torch.int32, device=device)
        return cls(allocate(config, batch_size, capacity, dtype, device), lengths, scales=scales)

    def scales_of(self, layer: int) -> dict[str, Tensor]:
        """The arguments key_scale and value_scale of the operators, where there are scales."""
        if self.scales is None:
            return {}
        key_scale, value_scale = self.scales[2 * layer : 2 * layer + 2]
        return {"key_scale": key_scale, "value_scale": value_scale}

    def check_room(self, batch_size: int, new_tokens: int) -> None:
        """Raises ValueError where the cache cannot take that many more tokens."""
        if batch_size != self.batch_size:
            raise ValueError(
                f"token_ids has a batch of {batch_size}, the cache one of {self.batch_size}"
            )
        if self.used + new_tokens > self.capacity:
            raise ValueError(
                f"token_ids: {new_tokens} more tokens do not fit in a cache that holds "
                f"{self.used} of {self.capacity}"
            )

    def advance(self, new_tokens: int) -> None:
        """Counts tokens whose keys and values have been written in every layer.

        Not where there is a block_table: an engine makes such a cache for one step, and an
        addition after a decoding step, whose weights have emptied all caches, takes 70 us.
        """
        if self.block_table is None:
            self.lengths.add_(new_tokens)
            self.used += new_tokens

    def reset(self) -> None:
        """Forgets everything, keeping the memory."""
        self.lengths.zero_()
        self.used = 0
