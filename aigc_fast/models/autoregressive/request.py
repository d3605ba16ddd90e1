"""One sequence on its way through an engine."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from .pages import HeldPages
from .prompt_lookup import PromptLookup
from .sampling import Choice

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Update:
    """What a step added to a request.

    Attributes:
        tokens, logprobs: the new tokens, a stop token included, and the logarithms of the
            probabilities that the model gave them.
        text: the new text that can be shown. It ends before a stop string, and what may be the
            beginning of one is held back. Empty without a tokenizer.
        finish_reason: "stop", "length" or "cancelled" in the last update; None before.
    """

    request: Request
    tokens: list[int]
    logprobs: list[float]
    text: str
    finish_reason: FinishReason | None


class Request:
    """A prompt and what has been generated after it.

    Attributes:
        prompt: its token ids.
        tokens, logprobs, text, finish_reason: as in `Update`, of all updates together.
    """

    def __init__(
        self,
        prompt: list[int],
        max_new_tokens: int,
        choice: Choice,
        stop_tokens: frozenset[int],
        text: StoppedText,
        draft_tokens: int,
    ) -> None:
        self.prompt = prompt
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self._max_new_tokens, self._stop_tokens, self._text = max_new_tokens, stop_tokens, text
        self._draft_tokens, self._lookup = draft_tokens, PromptLookup()
        if draft_tokens:
            self._lookup.extend(prompt)
        # What the engine keeps of it.
        self.choice = choice
        self.held: HeldPages | None = None
        self.computed = 0  # tokens with keys and values

    def __repr__(self) -> str:
        text, tokens = reprlib.repr(self.text), len(self.tokens)
        return f"Request(text={text}, {tokens} tokens, finish_reason={self.finish_reason!r})"

    @property
    def capacity(self) -> int:
        """Keys and values it needs at most: the last token is never fed to the model."""
        return len(self.prompt) + self._max_new_tokens - 1

    def known(self, count: int) -> list[int]:
        """The first `count` tokens of prompt and answer."""
        return (self.prompt + self.tokens)[:count]

    def draft(self) -> list[int]:
        """The newest token, which is to be computed, and guesses of those after it."""
        room = self._max_new_tokens - len(self.tokens) - 1
        drafts = min(room, self._draft_tokens)
        return self.tokens[-1:] + (self._lookup.draft(drafts) if drafts else [])

    def accept(self, tokens: Sequence[int], logprobs: Sequence[float]) -> Update:
        """Takes new tokens, up to one that ends the answer."""
        before, text = len(self.tokens), ""
        for token, logprob in zip(tokens, logprobs, strict=True):
            self.tokens.append(token)
            self.logprobs.append(logprob)
            text += self._text.add(token)
            if token in self._stop_tokens or self._text.stopped:
                self.finish_reason = "stop"
            elif len(self.tokens) == self._max_new_tokens:
                self.finish_reason = "length"
            if self.finish_reason:
                text += self._text.rest()
                break
        if self._draft_tokens:
            self._lookup.extend(self.tokens[before:])
        self.text += text
        return Update(self, self.tokens[before:], self.logprobs[before:], text, self.finish_reason)


class StoppedText:
    """The text of tokens as they come, up to the first of some strings.

    Attributes:
        stopped: whether one of the strings has come.
    """

    def __init__(self, decode: Callable[[int], str] | None, stop_strings: Sequence[str]) -> None:
        self._decode, self._stop_strings = decode, stop_strings
        self._waiting = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is now sure to lie before a stop string."""
        if self._decode is None or self.stopped:
            return ""
        text = self._waiting + self._decode(token)
        ends = [at for stop in self._stop_strings if (at := text.find(stop)) >= 0]
        if ends:
            self.stopped = True
            kept = min(ends)
            self._waiting = ""
        else:
            kept = len(text) - max(map(self._begun(text), self._stop_strings), default=0)
            self._waiting = text[kept:]
        return text[:kept]

    def rest(self) -> str:
        """What still waits, at the end of the answer."""
        text, self._waiting = self._waiting, ""
        return text

    @staticmethod
    def _begun(text: str) -> Callable[[str], int]:
        """How many characters of a stop string, not all, the text ends with."""

        def count(stop: str) -> int:
            most = min(len(stop) - 1, len(text))
            return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)

        return count
