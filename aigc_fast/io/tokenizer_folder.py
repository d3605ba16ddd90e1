"""The tokenizer and the chat template of a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .hf_folder import read_json
from .text_tokenizer import TextTokenizer, sound


def read_folder_tokenizer(folder: Path) -> TextTokenizer:
    """Reads tokenizer.json, and what the files beside it say of it."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError("this needs the package tokenizers: pip install tokenizers") from error

    source = folder / "tokenizer.json"
    content = source.read_bytes()
    with sound(str(source)):
        tokenizer = Tokenizer.from_buffer(content)

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
    stop = _stop_tokens(folder, tokenizer.get_vocab_size())
    if not stop and (eos := tokenizer.token_to_id(special.get("eos_token", ""))) is not None:
        stop = {eos}
    return TextTokenizer(
        path=str(folder),
        tokenizer=tokenizer,
        stop_tokens=tuple(sorted(stop)),
        chat_template=_chat_template(folder, config),
        special_tokens=special,
    )


def _stop_tokens(folder: Path, vocab_size: int) -> set[int]:
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


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
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
