"""The words in which arguments are refused."""

from __future__ import annotations

from dataclasses import fields
from numbers import Integral, Real
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from aigc_fast.io.token_ids import integer
from aigc_fast.ops._checks import has_data

if TYPE_CHECKING:
    from .config import DecoderConfig


def count(name: str, value: Any, least: int = 1) -> int:
    """`value` as an int that is at least `least`, 0 or 1, and fits in int32.

    Raises:
        TypeError, ValueError: it does not.
    """
    number = integer(name, value)
    if number < least:
        raise ValueError(
            f"{name} must {'be positive' if least else 'not be negative'}, got {value}"
        )
    if number >= 2**31:
        raise ValueError(f"{name} must be below 2**31, got {value}")
    return number


def check_token_ids(token_ids: Any, config: DecoderConfig) -> None:
    """Raises TypeError or ValueError unless `token_ids` is (batch, seq) of known ids."""
    if not isinstance(token_ids, Tensor) or token_ids.dtype not in (torch.int64, torch.int32):
        kind = token_ids.dtype if isinstance(token_ids, Tensor) else type(token_ids).__name__
        raise TypeError(f"token_ids must be an int64 or int32 tensor, got {kind}")
    if token_ids.ndim != 2 or token_ids.numel() == 0:
        raise ValueError(
            f"token_ids must be (batch, seq) and not empty, got shape {tuple(token_ids.shape)}"
        )
    if not has_data(token_ids):
        return
    low, high = (int(bound) for bound in token_ids.aminmax())
    if low < 0 or high >= config.vocab_size:
        raise ValueError(
            f"token_ids must lie in [0, {config.vocab_size}), got {low if low < 0 else high}"
        )


def check_fields(instance: Any, prefix: str = "") -> None:
    """Raises TypeError unless the fields of a dataclass are of their annotated types.

    Numbers may be numpy's, a whole one may stand for a float, and a list for a tuple.
    """
    hints = get_type_hints(type(instance))
    for field in fields(instance):
        value, hint = getattr(instance, field.name), hints[field.name]
        kinds = get_args(hint) if NoneType in get_args(hint) else (hint,)
        if not any(_is_of(value, kind) for kind in kinds):
            raise TypeError(f"{prefix}{field.name} must be {field.type}, got {value!r}")


def _is_of(value: object, kind: Any) -> bool:
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if get_origin(kind) is tuple:
        item, _ = get_args(kind)
        items = get_args(item) or (item,)
        return isinstance(value, (tuple, list)) and all(
            any(_is_of(v, i) for i in items) for v in value
        )
    # A Literal is checked by who knows its choices.
    return isinstance(value, kind) if isinstance(kind, type) else True
