"""`aigc-fast speak`: a text, spoken by a VITS into a WAV file, sentence by sentence."""

from __future__ import annotations

import time
import warnings
import wave
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from aigc_fast.io import find_voice, load_voice_tokenizer
from aigc_fast.models.vocoder import VITS


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
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        sentences = tokenizer.encode(text)
    for warning in caught:
        console.print(str(warning.message), style="yellow", markup=False)
    if not sentences:
        raise ValueError("the text has nothing in it that the voice could say")
    generator = torch.Generator(device).manual_seed(seed)
    first, samples = 0.0, 0
    with wave.open(str(output), "wb") as file:
        file.setparams((1, 2, voice.config.sample_rate, 0, "NONE", "not compressed"))
        for ids in sentences:
            waveform, _ = voice.synthesize(
                torch.tensor([ids], device=device),
                speaker=speaker,
                length_scale=voice.config.length_scale / speed,
                noise_scale=noise,
                generator=generator,
            )
            file.writeframes(to_pcm(waveform))
            first = first or time.perf_counter() - start
            samples += waveform.shape[2]
    seconds = samples / voice.config.sample_rate
    factor = (time.perf_counter() - start) / seconds
    console.print(
        f"{output}: {seconds:.1f} s of audio, the first after {first * 1e3:.0f} ms; "
        f"real-time factor {factor:.2f}",
        markup=False,
        soft_wrap=True,
    )


def to_pcm(waveform: Tensor) -> bytes:
    """Samples in [-1, 1] as little-endian integers of 16 bits."""
    samples = (waveform.float().flatten() * 32767).round().to(torch.int16)
    return samples.cpu().numpy().astype("<i2").tobytes()
