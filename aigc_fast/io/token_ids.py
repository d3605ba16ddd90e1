"""Token ids as callers give them: lists, tuples, tensors, arrays."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Set
from typing import Any


def integer(name: str, value: Any) -> int:
    """`value` as an int, where it is one of Python, numpy or a tensor of no dimension.

    Raises:
        TypeError: it is not; True and False are not either.
    """
    try:
        # A tensor of bools has an index too.
        if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None


def ids_of(name: str, value: Any) -> list[int]:
    """The ids of one sequence.

    Raises:
        TypeError: they are not integers in one dimension.
    """
    shape = getattr(value, "shape", None)
    if shape is not None and len(shape) != 1:
        raise TypeError(f"{name} must have one dimension, got shape {tuple(shape)}")
    if isinstance(value, (str, bytes, bytearray, Mapping, Set)) or not hasattr(value, "__iter__"):
        raise TypeError(f"{name} must hold token ids, got {type(value).__name__}")
    ids = value.tolist() if hasattr(value, "tolist") else list(value)
    if not all(type(token) is int for token in ids):
        ids = [integer(f"each id of {name}", token) for token in ids]
    return ids
