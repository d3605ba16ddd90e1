"""Prompts and stops as callers give them."""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import TYPE_CHECKING, Any

from aigc_fast.io.token_ids import ids_of
from aigc_fast.ops._checks import check_class

if TYPE_CHECKING:
    from aigc_fast.io import TextTokenizer


def check_tokenizer(tokenizer: object) -> None:
    """Raises TypeError unless it is None or has what the engine needs of a TextTokenizer."""
    if not (tokenizer is None or hasattr(tokenizer, "stream_decoder")):
        raise TypeError(f"tokenizer must be a TextTokenizer, got {type(tokenizer).__name__}")


def prompt_ids(prompt: Any, tokenizer: TextTokenizer | None) -> list[int]:
    """The token ids of a prompt."""
    if not isinstance(prompt, str):
        return ids_of("prompt", prompt)
    if tokenizer is None:
        raise ValueError("a prompt in text needs a tokenizer, but there is none")
    return tokenizer.encode(prompt)


def stop_token_ids(value: Any) -> list[int]:
    """The ids of one number or of several."""
    if isinstance(value, Set):
        value = list(value)
    one = isinstance(value, int) or getattr(value, "shape", None) == ()
    return ids_of("stop_tokens", [value] if one else value)


def stop_texts(value: Any) -> list[str]:
    """The strings as a list; TypeError or ValueError for what is no list of texts."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"stop_strings must be a list of strings, got {type(value).__name__}")
    strings = list(value)
    for string in strings:
        check_class("each of stop_strings", string, str)
    if not all(strings):
        raise ValueError("stop_strings must not hold an empty string")
    return strings


def check_known(name: str, ids: Iterable[int], vocab_size: int) -> None:
    """ValueError for an id outside the vocabulary."""
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ValueError(f"{name} must lie in [0, {vocab_size}), got {token}")
