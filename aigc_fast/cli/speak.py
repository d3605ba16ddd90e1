"""`aigc-fast speak`: a text, spoken by a VITS into a WAV file, sentence by sentence."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from aigc_fast.io import find_voice, load_voice_tokenizer, write_wav
from aigc_fast.io.voice_tokenizer import VoiceTokenizer
from aigc_fast.models.vocoder import VITS


class Speech:
    """The waveforms of a text, (1, 1, samples) on the CPU, sentence by sentence; once.

    speed: 2 is twice as fast. noise: how varied speech is, None for the voice's own.

    Attributes, in seconds: `audio`, how long the waveforms are so far; `first`, from the text to
    the first of them; `elapsed`, to the last. ValueError where there is nothing to say.
    """

    def __init__(
        self,
        voice: VITS,
        tokenizer: VoiceTokenizer,
        text: str,
        *,
        seed: int,
        speaker: int | None = None,
        speed: float = 1.0,
        noise: float | None = None,
    ) -> None:
        self._start = time.perf_counter()
        self._voice, self._sentences = voice, tokenizer.encode(text)
        if not self._sentences:
            raise ValueError("the text has nothing in it that the voice could say")
        self._device = next(voice.parameters()).device
        self._options: dict[str, Any] = {
            "speaker": speaker,
            "length_scale": voice.config.length_scale / speed,
            "noise_scale": noise,
            "generator": torch.Generator(self._device).manual_seed(seed),
        }
        self.audio = self.first = self.elapsed = 0.0

    def __iter__(self) -> Iterator[Tensor]:
        for sentence in self._sentences:
            ids = torch.tensor([sentence], device=self._device)
            waveform, _ = self._voice.synthesize(ids, **self._options)
            waveform = waveform.cpu()  # waits for a GPU
            self.elapsed = time.perf_counter() - self._start
            self.first = self.first or self.elapsed
            self.audio += waveform.shape[2] / self._voice.config.sample_rate
            yield waveform

    @property
    def real_time_factor(self) -> float:
        """Seconds of work for a second of audio."""
        return self.elapsed / self.audio

    def __str__(self) -> str:
        return (
            f"{self.audio:.1f} s of audio, the first after {self.first * 1e3:.0f} ms; "
            f"real-time factor {self.real_time_factor:.3f}"
        )


def run(
    console: Console,
    text: str,
    output: Path,
    *,
    model: Path | None,
    speaker: int | None,
    speed: float,
    noise: float | None,
    seed: int,
    dtype: str,
) -> None:
    if output.suffix.lower() != ".wav":
        raise ValueError(f"{output}: the output must be a .wav file")
    if not output.parent.is_dir():
        raise ValueError(f"{output}: there is no folder {output.parent}")
    path = find_voice() if model is None else model
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with console.status("reading the voice"):
        voice = VITS.from_pretrained(path).to(device, getattr(torch, dtype))
        tokenizer = load_voice_tokenizer(path)
    if speaker is None and voice.config.num_speakers > 1:
        speaker = 0
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_: console.print(
            str(message), style="yellow", markup=False
        )
        speech = Speech(
            voice, tokenizer, text, seed=seed, speaker=speaker, speed=speed, noise=noise
        )
    write_wav(output, speech, voice.config.sample_rate)
    console.print(f"{output}: {speech}", markup=False, soft_wrap=True)
