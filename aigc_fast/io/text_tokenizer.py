"""Text to token ids and back, and the prompts of conversations."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING

from .token_ids import ids_of, integer

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@contextmanager
def sound(path: str) -> Iterator[None]:
    """Makes a ValueError of whatever the package tokenizers raises.

    That is Exception itself, or, where its Rust code panics on a hostile file, a BaseException.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        raise ValueError(f"{path}: not a sound tokenizer: {error}") from None


@dataclass(frozen=True)
class TextTokenizer:
    """Text to token ids and back.

    Attributes:
        tokenizer: the `tokenizers.Tokenizer` that does the work.
        stop_tokens: ids that end an answer.
        chat_template: Jinja source that lays out a conversation, or None.
        special_tokens: `bos_token` and `eos_token`, for the template.
    """

    path: str
    tokenizer: Tokenizer
    stop_tokens: tuple[int, ...]
    chat_template: str | None = None
    special_tokens: dict[str, str] = field(default_factory=dict)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """The token ids of a text; names of special tokens in it become those tokens.

        Args:
            add_special_tokens: with what the tokenizer puts around a text, such as `<bos>`. A
                chat template has written it already.

        Raises:
            TypeError: `text` is not a string.
            ValueError: it holds half of a surrogate pair, which is no character.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text must be Unicode: {error}") from None
        with sound(self.path):
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of some token ids, without special tokens."""
        ids = ids_of("token_ids", token_ids)
        if ids and not 0 <= min(ids) <= max(ids) < 2**32:
            raise ValueError(f"token_ids must lie in [0, 2**32), got {min(ids)} to {max(ids)}")
        with sound(self.path):
            return self.tokenizer.decode(ids, skip_special_tokens=True)

    def stream_decoder(self) -> Callable[[int], str]:
        """A function that takes one id after another and returns the text that each adds.

        It never cuts a character: where one takes several ids, the last of them brings it.
        """
        from tokenizers.decoders import DecodeStream

        decoder = DecodeStream(skip_special_tokens=True)

        def add(token_id: int) -> str:
            token_id = integer("token_id", token_id)
            with sound(self.path):
                return decoder.step(self.tokenizer, token_id) or ""

        return add

    def decode_stream(self, token_ids: Iterable[int]) -> Iterator[str]:
        """The text piece by piece, as the ids arrive; a piece never cuts a character."""
        return filter(None, map(self.stream_decoder(), token_ids))

    def chat_prompt(self, messages: Sequence[dict[str, str]]) -> str:
        """Lays out a conversation, ready for the model's next answer.

        Args:
            messages: such as `[{"role": "user", "content": "Hello"}]`.

        Raises:
            ValueError: there is no template, or the template fails on these messages.
        """
        if self.chat_template is None:
            raise ValueError(f"{self.path}: there is no chat template")
        from jinja2.exceptions import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise TemplateError(message)

        # The options and the globals that templates are written for by convention.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(
            value, ensure_ascii=False, indent=indent
        )
        try:
            return environment.from_string(self.chat_template).render(
                messages=messages, add_generation_prompt=True, **self.special_tokens
            )
        # The template is code from outside: it may fail in any way Python can.
        except Exception as error:
            raise ValueError(f"{self.path}: the chat template fails: {error}") from error
