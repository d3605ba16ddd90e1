"""Speech to train a vocoder on."""

import re
from pathlib import Path

import torch
from torch import Tensor

from aigc_fast.io import find_voice, load_python_reference, load_voice_tokenizer, load_waveforms
from aigc_fast.io.wav import to_int16
from aigc_fast.models.vocoder import VITS

from .speak import Speech

_SENTENCES = 80  # of the voice: six minutes, which take it one
_HELD_OUT = 10  # every tenth utterance is kept aside,
_MOST, _SECONDS = 5, 8  # of which so many are listened to, so much of each


def load_speech(name: str, device: torch.device) -> tuple[list[Tensor], int]:
    """Waveforms, int16 (samples,), at least two, and their samples a second: of a folder of WAV
    files, or of "voice", the one that `aigc-fast speak` speaks with."""
    if name == "voice":
        return speak_sentences(_SENTENCES, device)
    if not Path(name).is_dir():
        raise ValueError(f"data must be voice or a folder of WAV files, got {name!r}")
    waveforms, rate = load_waveforms(name)
    if len(waveforms) < 2:
        raise ValueError(f"data must hold at least two files, one of which is held out: {name}")
    return waveforms, rate


def split(waveforms: list[Tensor], rate: int) -> tuple[list[Tensor], list[Tensor]]:
    """Those to train on, and of the others, every tenth, the beginnings of the first five."""
    training = [w for number, w in enumerate(waveforms) if number % _HELD_OUT]
    return training, [w[: _SECONDS * rate] for w in waveforms[::_HELD_OUT][:_MOST]]


def speak_sentences(count: int, device: torch.device) -> tuple[list[Tensor], int]:
    """So many sentences of the language reference of Python, spoken."""
    path = find_voice()
    voice, tokenizer = VITS.from_pretrained(path).to(device), load_voice_tokenizer(path)
    waveforms = [
        torch.cat([to_int16(part) for part in Speech(voice, tokenizer, sentence, seed=number)])
        for number, sentence in enumerate(sentences()[:count])
    ]
    return waveforms, voice.config.sample_rate


def sentences() -> list[str]:
    """Those of the language reference that are words alone, 40 to 120 characters long."""
    text = " ".join(load_python_reference())
    found = re.findall(r"(?<=\.)\s+([A-Z][a-z]*(?:,?\s[a-z]+)+\.)(?=\s)", text)
    plain = (" ".join(sentence.split()) for sentence in found)
    return list(dict.fromkeys(s for s in plain if 40 <= len(s) <= 120))
