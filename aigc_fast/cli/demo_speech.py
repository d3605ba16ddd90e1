"""The demo's speech: a published voice says two sentences."""

from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

import aigc_fast
from aigc_fast.io import find_voice, load_voice_tokenizer
from aigc_fast.io.voice_tokenizer import VoiceTokenizer
from aigc_fast.io.wav import to_pcm
from aigc_fast.models.vocoder import VITS

from .speak import Speech

TEXT = "Sunlight bends as it enters a drop of rain. Each color leaves at an angle of its own."


@dataclass
class SpeechResult:
    """Seconds of work for a second of speech of each implementation, and whether the 16-bit samples
    of both are the same to one step; waveform: (samples,) in [-1, 1]."""

    ours: float
    reference: float
    same_audio: bool
    waveform: Tensor
    sample_rate: int


def run(console: Console, device: torch.device) -> SpeechResult:
    path = find_voice()
    with console.status("reading the voice"):
        voice, tokenizer = VITS.from_pretrained(path).to(device), load_voice_tokenizer(path)
    console.print(f"[bold]{TEXT}[/]", soft_wrap=True)
    waveform, ours = _spoken(voice, tokenizer)
    with console.status("the same in plain PyTorch"), aigc_fast.backend("reference"):
        other, reference = _spoken(voice, tokenizer)
    same = is_same_audio(waveform, other)
    console.print(
        f"[dim]{ours}, of plain PyTorch {reference.real_time_factor:.3f}; "
        f"{'the same audio in both' if same else 'NOT the same audio'}[/]"
    )
    return SpeechResult(
        ours.real_time_factor, reference.real_time_factor, same, waveform, voice.config.sample_rate
    )


def _spoken(voice: VITS, tokenizer: VoiceTokenizer) -> tuple[Tensor, Speech]:
    for _ in range(2):  # the first call is slower
        speech = Speech(voice, tokenizer, TEXT, seed=0)
        parts = list(speech)
    return torch.cat(parts, 2).flatten(), speech


def is_same_audio(one: Tensor, other: Tensor) -> bool:
    """Whether both are as long, and in a file of 16 bits no sample differs by more than one step,
    as numbers on either side of a half do however close they are."""
    if one.shape != other.shape:
        return False
    first, second = (np.frombuffer(to_pcm(x), "<i2").astype(np.int32) for x in (one, other))
    return bool((abs(first - second) <= 1).all())
