"""Texts to train a language model on."""

from __future__ import annotations

import os
from pathlib import Path


def load_texts(path: str | os.PathLike[str]) -> list[str]:
    """A text file, or the .txt files of a folder and its sub-folders in the order of their paths;
    hidden and empty ones are left out.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is not UTF-8; there is no text.
    """
    files = [Path(path)]
    if files[0].is_dir():
        files = sorted(
            file
            for file in files[0].rglob("*.txt")
            if not file.is_dir()
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
        if not files:
            raise ValueError(f"{path}: holds no .txt files")
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8-sig"))  # without a byte order mark
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not UTF-8 text: {error}") from None
    if not (texts := [text for text in texts if text.strip()]):
        raise ValueError(f"{path}: holds no text")
    return texts


def load_python_reference() -> list[str]:
    """The topics of the language reference that comes with Python, 380,000 characters.

    A fifth of its paragraphs stand in several topics, here only in the first: a text that part of
    is held out must not say the same twice.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    texts = []
    for name in sorted(topics):
        paragraphs = dict.fromkeys(topics[name].split("\n\n"))
        texts.append("\n\n".join(part for part in paragraphs if part not in seen))
        seen.update(paragraphs)
    return [text for text in texts if text.strip()]
