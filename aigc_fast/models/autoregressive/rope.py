"""Angles of the rotary embedding, and the ways to stretch them over longer sequences.

The formulas are those of transformers' modeling_rope_utils, in float64. Sources: Su et al. 2021
(arXiv:2104.09864); Peng et al. 2023, YaRN (arXiv:2309.00071), which also describes linear and
NTK-aware scaling; Ding et al. 2024, LongRoPE (arXiv:2402.13753); Llama 3 as Meta published it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from aigc_fast.ops._checks import check_choice

from .arguments import check_fields

if TYPE_CHECKING:
    from .config import DecoderConfig

Kind = Literal["linear", "dynamic", "yarn", "llama3", "longrope", "divisors"]


@dataclass(frozen=True)
class RopeScaling:
    """How the frequencies differ from rope_theta ** (-2i / rotary_dim).

    Attributes:
        kind: `linear` divides all by `factor`; `dynamic` raises the base once a sequence is longer
            than `original_length`; `yarn` and `llama3` divide the slow ones and leave the fast
            ones; `longrope` divides each by its own, of one set or another as sequences can become
            longer than `original_length` or not; `divisors` divides each by its own.
        factor: how many times the original length is reached.
        original_length: the longest sequence before the scaling.
        low_freq_factor, high_freq_factor: llama3; waves longer than original_length /
            low_freq_factor are divided, shorter than original_length / high_freq_factor left.
        beta_fast, beta_slow: yarn; turns within the original length, above and below which a
            frequency is left and divided.
        truncate: yarn; round the two borders to whole frequencies.
        attention_factor: multiplies cos and sin; None is 0.1 * log(factor) + 1 for yarn and
            sqrt(1 + log(factor) / log(original_length)) for longrope.
        divisors: one for each pair of features; of longrope the short set.
        long_divisors: longrope; the long set.
    """

    kind: Kind
    factor: float = 1.0
    original_length: int = 2048
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    divisors: tuple[float, ...] = ()
    long_divisors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self, "rope_scaling.")
        check_choice("rope_scaling.kind", self.kind, get_args(Kind))
        for field in fields(self):
            value = getattr(self, field.name)
            numbers = value if isinstance(value, tuple) else (value,)
            if field.name in ("kind", "truncate") or value is None:
                continue
            limit = 2**63 if type(value) is int else math.inf
            if not all(0 < number < limit for number in numbers):
                raise ValueError(
                    f"rope_scaling.{field.name} must be positive and finite, got {value}"
                )
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                "rope_scaling.low_freq_factor must be below high_freq_factor, got "
                f"{self.low_freq_factor} and {self.high_freq_factor}"
            )
        if self.kind == "longrope" and self.original_length < 2:
            raise ValueError("rope_scaling.original_length must be above 1 for longrope, got 1")

    @property
    def reach(self) -> int:
        """The longest sequence after the scaling, by its factor (0 where the factor has no say)."""
        stretched = self.kind in ("linear", "dynamic", "yarn")
        return int(min(self.factor * self.original_length, 2**62)) if stretched else 0

    def stretches(self, length: int) -> bool:
        """Whether the frequencies of a sequence of that length are its own (dynamic scaling)."""
        return self.kind == "dynamic" and length > self.original_length

    def is_long(self, longest: int) -> bool:
        """Whether sequences that can become so long have the long frequencies of longrope, from
        their first token on: keys in a cache stay as they were rotated."""
        return self.kind == "longrope" and longest > self.original_length


def rotations(
    config: DecoderConfig, positions: Tensor, length: int
) -> tuple[tuple[Tensor, Tensor], ...]:
    """cos and sin, float64 (*positions.shape, rotary_dim / 2), and with a `local_rope_theta` also
    those of the layers with a window; length as for `inverse_frequencies`."""

    def turn(frequencies: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        angles = positions[..., None].double() * frequencies.to(positions.device)
        return angles.cos() * factor, angles.sin() * factor

    found = turn(inverse_frequencies(config, length), attention_factor(config.rope_scaling))
    if config.local_rope_theta is None:
        return (found,)
    return found, turn(_plain(config.local_rope_theta, config.rotary_dim), 1.0)


def attention_factor(scaling: RopeScaling | None) -> float:
    """What cos and sin are multiplied by."""
    if scaling is None or scaling.kind not in ("yarn", "longrope"):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    log = math.log(max(scaling.factor, 1.0))
    if scaling.kind == "longrope":
        return math.sqrt(1 + log / math.log(scaling.original_length))
    return 0.1 * log + 1.0


def inverse_frequencies(config: DecoderConfig, length: int) -> Tensor:
    """Radians per position of every pair of features, float64 (rotary_dim / 2,).

    Args:
        length: of the sequence so far, at which dynamic scaling looks, or the most it can become,
            at which longrope does.
    """
    dim, base, scaling = config.rotary_dim, config.rope_theta, config.rope_scaling
    assert dim is not None  # DecoderConfig fills it in
    if scaling is not None and scaling.stretches(length):
        stretch = scaling.factor * length / scaling.original_length - (scaling.factor - 1)
        base *= stretch ** (dim / (dim - 2))
    plain = _plain(base, dim)
    if scaling is None or scaling.kind == "dynamic":
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    if scaling.kind in ("divisors", "longrope"):
        divisors = scaling.long_divisors if scaling.is_long(length) else scaling.divisors
        return plain / torch.tensor(divisors, dtype=torch.float64, device="cpu")
    keep = (
        _yarn_keep(dim, base, scaling) if scaling.kind == "yarn" else _llama3_keep(plain, scaling)
    )
    return plain * keep + plain / scaling.factor * (1 - keep)


def _plain(base: float, dim: int | None) -> Tensor:
    assert dim is not None  # DecoderConfig fills it in
    return base ** -(torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)


def _yarn_keep(dim: int, base: float, scaling: RopeScaling) -> Tensor:
    """1 for the frequencies that stay, 0 for those that are divided, a ramp between them."""

    def border(turns: float) -> float:
        """The (fractional) index of the frequency with that many turns in the old length."""
        wavelength = scaling.original_length / (turns * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(base))

    low, high = border(scaling.beta_fast), border(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # as transformers does; both are a step then
    ramp = (torch.arange(dim // 2, dtype=torch.float64, device="cpu") - low) / (high - low)
    return 1 - ramp.clamp(0, 1)


def _llama3_keep(plain: Tensor, scaling: RopeScaling) -> Tensor:
    turns = scaling.original_length * plain / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return ((turns - low) / (high - low)).clamp(0, 1)
