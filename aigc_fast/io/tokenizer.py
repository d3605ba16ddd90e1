"""The tokenizer and the chat template that a GGUF file or a Hugging Face folder carries."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .gguf import GGUFFile, read_gguf
from .hf_folder import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# ggml's token types that text may name as a whole: 3 is control, 4 is user-defined.
_CONTROL, _USER_DEFINED = 3, 4


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
        """
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of some token ids, without special tokens."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def decode_stream(self, token_ids: Iterable[int]) -> Iterator[str]:
        """The text piece by piece, as the ids arrive; a piece never cuts a character."""
        from tokenizers.decoders import DecodeStream

        decoder = DecodeStream(skip_special_tokens=True)
        for token_id in token_ids:
            piece = decoder.step(self.tokenizer, token_id)
            if piece:
                yield piece

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


def load_tokenizer(path: str | os.PathLike[str]) -> TextTokenizer:
    """Builds the tokenizer of a model on disk.

    Args:
        path: a GGUF file with a byte-level BPE tokenizer, or a folder with a tokenizer.json.

    Raises:
        OSError: a file cannot be opened.
        ValueError: a file is unsound, or its tokenizer is of a kind not known here.
        ImportError: the package `tokenizers` is not installed.
    """
    return _read_folder(Path(path)) if os.path.isdir(path) else _build(read_gguf(path))


def _read_folder(folder: Path) -> TextTokenizer:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError("this needs the package tokenizers: pip install tokenizers") from error

    source = folder / "tokenizer.json"
    content = source.read_bytes()
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # the package raises the base class itself
        raise ValueError(f"{source}: not a sound tokenizer: {error}") from None

    config_path = folder / "tokenizer_config.json"
    config = read_json(config_path) if config_path.exists() else {}
    special: dict[str, str] = {}
    for name in ("bos_token", "eos_token"):
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and not isinstance(token, str):
            raise ValueError(f"{config_path}: {name!r} must be a string, got {token!r}")
        if token is not None:
            special[name] = token
    stop = _folder_stop_tokens(folder, tokenizer.get_vocab_size())
    if not stop and (eos := tokenizer.token_to_id(special.get("eos_token", ""))) is not None:
        stop = {eos}
    return TextTokenizer(
        path=str(folder),
        tokenizer=tokenizer,
        stop_tokens=tuple(sorted(stop)),
        chat_template=_folder_chat_template(folder, config),
        special_tokens=special,
    )


def _folder_stop_tokens(folder: Path, vocab_size: int) -> set[int]:
    """`eos_token_id`, a number or a list, of the first file that has it."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        found = read_json(path).get("eos_token_id") if path.exists() else None
        if found is None:
            continue
        ids = found if isinstance(found, list) else [found]
        for token_id in ids:
            if type(token_id) is not int or not 0 <= token_id < vocab_size:
                raise ValueError(
                    f"{path}: 'eos_token_id' must be token ids below {vocab_size}, got {found!r}"
                )
        return set(ids)
    return set()


def _folder_chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # named templates; `default` is the one for conversations
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError(
            f"{folder}: 'chat_template' must be a string, got {type(template).__name__}"
        )
    return template


def _build(file: GGUFFile) -> TextTokenizer:
    try:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    except ImportError as error:
        raise ImportError("this needs the package tokenizers: pip install tokenizers") from error

    for key, known in (("tokenizer.ggml.model", "gpt2"), ("tokenizer.ggml.pre", "smollm")):
        if (value := file.get(key, str)) != known:
            raise ValueError(f"{file.path}: {key} is {value!r}; only {known!r} is supported")
    tokens = file.get("tokenizer.ggml.tokens", list)
    merges = [tuple(merge.split(" ")) for merge in file.get("tokenizer.ggml.merges", list)]
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ValueError(f"{file.path}: tokenizer.ggml.tokens holds a token twice")
    for merge in merges:
        if len(merge) != 2 or not vocab.keys() >= {*merge, "".join(merge)}:
            raise ValueError(
                f"{file.path}: tokenizer.ggml.merges: {' '.join(merge)!r} is not a pair of tokens "
                "whose join is a token"
            )
    kinds = file.get("tokenizer.ggml.token_type", np.ndarray)
    if len(kinds) != len(tokens):
        raise ValueError(
            f"{file.path}: tokenizer.ggml.token_type has {len(kinds)} values "
            f"for {len(tokens)} tokens"
        )

    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    whole = [(token, kind) for token, kind in zip(tokens, kinds, strict=True) if token]
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False) for token, kind in whole if kind == _CONTROL]
    )
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False) for token, kind in whole if kind == _USER_DEFINED]
    )

    special: dict[str, int] = {}
    for name in ("bos", "eos", "eot"):
        key = f"tokenizer.ggml.{name}_token_id"
        if key in file.metadata:
            special[name] = file.get(key, int)
            if not 0 <= special[name] < len(tokens):
                raise ValueError(f"{file.path}: {key} is {special[name]} of {len(tokens)} tokens")
    template_key = "tokenizer.chat_template"
    return TextTokenizer(
        path=file.path,
        tokenizer=tokenizer,
        stop_tokens=tuple(sorted({special[name] for name in ("eos", "eot") if name in special})),
        chat_template=file.get(template_key, str) if template_key in file.metadata else None,
        special_tokens={
            f"{name}_token": tokens[special[name]] for name in ("bos", "eos") if name in special
        },
    )
