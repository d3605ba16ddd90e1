"""cos and sin of every position, kept from one call of a model to the next."""

from __future__ import annotations

import torch
from torch import Tensor

from aigc_fast.ops._layout import wide_dtype

from .config import DecoderConfig
from .rope import rotations

#: cos and sin of each rotation of a model
Tables = tuple[tuple[Tensor, Tensor], ...]


class RotaryTables:
    """The rotary embedding of a model: tables for positions below a length, or computed angles.

    Not buffers of the model: `model.to(torch.bfloat16)` must leave the angles exact. They are
    float32 (float64 for a model in float64), on the model's device.
    """

    def __init__(self, config: DecoderConfig) -> None:
        self._config = config
        self._tables: Tables = ()
        self._is_long = False

    def at(self, positions: Tensor, length: int, weight: Tensor) -> Tables:
        """cos and sin of `positions`, each (*positions.shape, rotary_dim / 2).

        Args:
            length: as for `rope.inverse_frequencies`.
            weight: any of the model's, for its device and dtype.
        """
        device, dtype = weight.device, wide_dtype(weight.dtype)
        found = rotations(self._config, positions, length)
        return tuple((cos.to(device, dtype), sin.to(device, dtype)) for cos, sin in found)

    def below(self, length: int, longest: int, weight: Tensor) -> Tables:
        """cos and sin of every position below `length`, or below more, in sequences of at most
        `longest` tokens.

        Args:
            weight: as for `at`.
        """
        scaling = self._config.rope_scaling
        is_long = scaling is not None and scaling.is_long(longest)
        if self._tables and self._is_long == is_long:
            cos = self._tables[0][0]
            kept = cos.dtype == wide_dtype(weight.dtype) and cos.device == weight.device
            if kept and len(cos) >= length:
                return self._tables
        # A table made while generating must also serve training.
        with torch.inference_mode(False):
            self._tables = self.at(
                torch.arange(length, device="cpu"), longest if is_long else 1, weight
            )
        self._is_long = is_long
        return self._tables
