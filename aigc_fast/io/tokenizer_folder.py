"""The tokenizer and the chat template of a Hugging Face folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ._whole import written_whole
from .hf_folder import read_json, write_json
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


# What transformers' tokenizers write, beside old names for the same content.
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)


def write_folder_tokenizer(tokenizer: TextTokenizer, folder: Path) -> None:
    """The inverse of `read_folder_tokenizer`; of a tokenizer that came from a folder, its files."""
    source = Path(tokenizer.path)
    names = [name for name in _FILES if source.is_dir() and (source / name).exists()]
    if "tokenizer.json" not in names:
        with written_whole(folder / "tokenizer.json") as partial:
            tokenizer.tokenizer.save(str(partial))
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        if tokenizer.chat_template is not None:
            config["chat_template"] = tokenizer.chat_template
        write_json(folder / "tokenizer_config.json", config | tokenizer.special_tokens)
    elif not source.samefile(folder):
        for name in names:
            with written_whole(folder / name) as partial:
                shutil.copyfile(source / name, partial)
    # The source may have named them in its config.json alone.
    generation = folder / "generation_config.json"
    written = read_json(generation) if "generation_config.json" in names else {}
    if written.get("eos_token_id") is None and tokenizer.stop_tokens:
        write_json(generation, {**written, "eos_token_id": [*tokenizer.stop_tokens]})


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
