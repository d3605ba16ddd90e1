"""Keys and values of the tokens a decoder has seen."""

from __future__ import annotations

import torch

from .config import DecoderConfig


class KVCache:
    """Preallocated keys and values, one pair of tensors a layer, for a batch of sequences.

    Attributes:
        keys, values: num_layers tensors (batch, capacity, num_kv_heads, head_dim).
        lengths: int32 (batch,), the valid entries of each sequence. It may be lowered, to take
            tokens back or to drop the padding of a prompt.
        used: at least the largest of `lengths`, kept so that room is checked without waiting
            for the device.
    """

    def __init__(
        self,
        config: DecoderConfig,
        batch_size: int,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}")
        if not 1 <= capacity <= config.max_position_embeddings:
            raise ValueError(
                f"capacity must be 1 to max_position_embeddings = "
                f"{config.max_position_embeddings}, got {capacity}"
            )
        self.batch_size, self.capacity = batch_size, capacity
        shape = (batch_size, capacity, config.num_kv_heads, config.head_dim)
        layers = range(config.num_layers)
        # Zeros, not empty: a masked NaN times a weight of zero would still be NaN.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        #: keys and values of each layer in turn
        self.in_turn = [t for pair in zip(self.keys, self.values, strict=True) for t in pair]
        self.lengths = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self.used = 0

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
        """Counts tokens whose keys and values have been written in every layer."""
        self.lengths.add_(new_tokens)
        self.used += new_tokens

    def reset(self) -> None:
        """Forgets everything, keeping the memory."""
        self.lengths.zero_()
        self.used = 0
