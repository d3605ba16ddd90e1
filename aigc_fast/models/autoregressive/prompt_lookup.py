"""Drafts of the next tokens from the text so far."""

from __future__ import annotations

from collections.abc import Sequence

_LONGEST, _SHORTEST = 3, 2


class PromptLookup:
    """Guesses that what followed the newest tokens earlier in the text follows them again.

    Source: prompt lookup decoding (Saxena 2023), assisted generation without a second model.
    """

    def __init__(self) -> None:
        self._tokens: list[int] = []
        # The token after the newest place of each few tokens in a row, the end of the text apart.
        self._after: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: Sequence[int]) -> None:
        """Adds to the text."""
        for token in tokens:
            end = len(self._tokens)
            for length in range(_SHORTEST, _LONGEST + 1):
                if end >= length:
                    self._after[tuple(self._tokens[end - length :])] = end
            self._tokens.append(token)

    def draft(self, most: int) -> list[int]:
        """At most so many tokens that may come next; none where the text gives no hint."""
        for length in range(_LONGEST, _SHORTEST - 1, -1):
            at = self._after.get(tuple(self._tokens[-length:]))
            if at is not None and most > 0:
                return self._tokens[at : at + most]
        return []
