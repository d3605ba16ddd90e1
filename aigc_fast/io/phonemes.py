"""Text to phonemes, by the C library eSpeak NG that the package espeakng-loader carries."""

from __future__ import annotations

import ctypes
import re
import threading
import unicodedata
from functools import lru_cache

_UTF8, _IPA = 1, 2
_SYNCHRONOUS, _DONT_EXIT = 2, 0x8000  # without the latter, missing data ends the process
#: a language or a voice of eSpeak; anything else could be the path of a file
_VOICE = re.compile(r"[a-zA-Z]{2,8}(-[a-zA-Z0-9]{1,16}){0,4}")
#: marks that end a clause, and those of other scripts as voices know them
_MARKS = {c: c for c in ".,:;!?"} | dict(zip("。，、：；！？।؟،؛", ".,,:;!?.?,;", strict=True))
_MARK = f"[{''.join(_MARKS)}]"
#: the end of a clause as it is written: marks, then brackets, quotes and spaces
_TERMINATOR = re.compile(rf"({_MARK}){_MARK}*((?!{_MARK})\W)*$")
#: English words before a dot that ends no sentence; single letters do so too
_ABBREVIATIONS = {
    "capt", "col", "dr", "gen", "jr", "lt", "mr", "mrs", "ms", "prof", "rev", "sgt", "sr", "st",
    "vs",
}  # fmt: skip
#: eSpeak has one state for the process
_lock = threading.Lock()


def phonemize(text: str, voice: str = "en-us") -> list[str]:
    """The sentences of a text, each in the International Phonetic Alphabet.

    voice: of eSpeak, such as "en-us" or "de".

    Clause by clause, each with the punctuation that ended it (. , : ; ! ?) behind it; decomposed
    (NFD), so that a phoneme with a mark on it is two characters. What has no sound is left out.

    Raises:
        ValueError: eSpeak has no such voice.
        ImportError: the package `espeakng-loader` is not installed.

    >>> phonemize("Rain, again! Why?")
    ['ɹˈeɪn, ɐɡˈɛn!', 'wˈaɪ?']
    """
    sentences = []
    for paragraph in re.split(r"\n\s*\n", text):
        sentence: list[str] = []
        for phonemes, mark in _clauses(paragraph, voice):
            if phonemes:
                sentence.append(phonemes + mark)
            if mark in (".", "!", "?"):
                sentences.append(" ".join(sentence))
                sentence = []
        sentences.append(" ".join(sentence))
    return [s for s in sentences if s]


def _clauses(text: str, voice: str) -> list[tuple[str, str]]:
    """Phonemes of each clause, and the punctuation that ended it or ""."""
    library = _library()
    text = text.replace("\0", " ").encode("utf-8", "replace").decode("utf-8")
    content = text.encode("utf-8") + b"\0"
    buffer = ctypes.create_string_buffer(content, len(content))
    start = ctypes.addressof(buffer)
    place, read, begin, found = ctypes.c_void_p(start), 0, 0, []
    with _lock:
        if not _VOICE.fullmatch(voice) or library.espeak_SetVoiceByName(voice.encode()):
            raise ValueError(f"eSpeak has no voice {voice!r}")
        while place.value is not None:
            phonemes = library.espeak_TextToPhonemes(ctypes.byref(place), _UTF8, _IPA) or b""
            # Of a clause the library only says where it has read to: one character beyond it.
            ended = place.value is None
            at = len(content) - 1 if place.value is None else place.value - start
            end = begin + len(content[read:at].decode("utf-8", "replace"))
            mark = _terminator(text, max(begin - 1, 0), end if ended else end - 1, ended)
            read, begin = at, end
            # Where the language changes, the other's name stands in brackets.
            plain = re.sub(r"\([^)]*\)", "", phonemes.decode("utf-8", "replace")).strip()
            found.append((unicodedata.normalize("NFD", plain), mark))
    return found


def _terminator(text: str, begin: int, end: int, ended: bool) -> str:
    """The punctuation at the end of the clause text[begin:end], as voices know it; ended: it is the
    last one."""
    begin = max(begin, end - 64)
    match = _TERMINATOR.search(text[begin:end])
    if match is None:
        return ""
    mark = _MARKS[match[1]]
    if mark == "." and not ended:
        before = begin + match.start()
        word = text[max(before - 16, 0) : before].split()[-1:] or [""]
        if len(word[0]) == 1 or word[0].lower() in _ABBREVIATIONS:
            return ""
    return mark


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    try:
        import espeakng_loader
    except ImportError as error:
        raise ImportError(
            "this needs the package espeakng-loader: pip install espeakng-loader"
        ) from error
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    library.espeak_SetVoiceByName.argtypes = [ctypes.c_char_p]
    library.espeak_TextToPhonemes.argtypes = [
        ctypes.POINTER(ctypes.c_void_p), ctypes.c_int, ctypes.c_int
    ]  # fmt: skip
    library.espeak_TextToPhonemes.restype = ctypes.c_char_p
    data = espeakng_loader.get_data_path().encode()
    if library.espeak_Initialize(_SYNCHRONOUS, 0, data, _DONT_EXIT) < 0:
        raise OSError("eSpeak cannot read its data in the package espeakng-loader")
    return library
