"""The tokenizer of a model on disk."""

from __future__ import annotations

import os
from pathlib import Path

from .text_tokenizer import TextTokenizer
from .tokenizer_folder import read_folder_tokenizer, write_folder_tokenizer
from .tokenizer_gguf import read_gguf_tokenizer

__all__ = ["TextTokenizer", "load_tokenizer", "save_tokenizer"]


def load_tokenizer(path: str | os.PathLike[str]) -> TextTokenizer:
    """Builds the tokenizer of a model on disk.

    Args:
        path: a GGUF file, or a Hugging Face folder with a tokenizer.json.

    Raises:
        OSError: a file cannot be opened.
        ValueError: a file is unsound, or its tokenizer is of a kind not known here.
        ImportError: the package `tokenizers` is not installed.
    """
    return read_folder_tokenizer(Path(path)) if os.path.isdir(path) else read_gguf_tokenizer(path)


def save_tokenizer(tokenizer: TextTokenizer, folder: str | os.PathLike[str]) -> None:
    """Writes tokenizer.json and the files beside it, which `load_tokenizer` and transformers'
    AutoTokenizer read; where the tokenizer came from a folder, its own files are copied.

    Raises:
        OSError: a file cannot be written.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    write_folder_tokenizer(tokenizer, target)
