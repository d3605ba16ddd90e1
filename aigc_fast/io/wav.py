"""WAV files of one channel, in and out."""

from __future__ import annotations

import os
import wave
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ._whole import written_whole


def load_waveforms(folder: str | os.PathLike[str]) -> tuple[list[Tensor], int]:
    """The .wav files of a folder and its sub-folders in the order of their paths, each int16
    (samples,), and their samples a second; hidden ones are left out.

    Raises:
        OSError: a file cannot be read.
        ValueError: there is none; one is not as `read_wav` takes them, or of another rate.
    """
    files = sorted(
        file
        for file in Path(folder).rglob("*")
        if file.suffix.lower() == ".wav"
        and not file.is_dir()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    if not files:
        raise ValueError(f"{folder}: holds no .wav files")
    waveforms, first = [], 0
    for file in files:
        waveform, rate = read_wav(file)
        first = first or rate
        if rate != first:
            raise ValueError(
                f"{file}: must have the {first} samples a second of {files[0]}, has {rate}"
            )
        waveforms.append(waveform)
    return waveforms, first


def read_wav(path: str | os.PathLike[str]) -> tuple[Tensor, int]:
    """The samples of a file, int16 (samples,), and how many there are a second.

    Integers of 8, 24 and 32 bits become such of 16. The extensible form of the header is read from
    Python 3.12 on.

    Raises OSError where it cannot be opened; ValueError where it is no WAV file of integers, is
    cut short, has no sample or more than one channel.
    """
    with Path(path).open("rb") as opened:
        try:
            with wave.open(opened) as file:
                channels, width, rate, count = file.getparams()[:4]
                # Python reserves what it is to read: four gigabytes, if the header says so.
                held = os.fstat(opened.fileno()).st_size // (channels * width)
                data = file.readframes(min(count, held))
        except (wave.Error, EOFError, RuntimeError) as error:
            reason = str(error) or "it ends too early"
            raise ValueError(f"{path}: not a WAV file of integers: {reason}") from None
    if channels != 1:
        raise ValueError(f"{path}: must have one channel, has {channels}")
    if not (1 <= width <= 4 and rate and count and len(data) == count * width):
        raise ValueError(
            f"{path}: unsound: {len(data)} bytes for {count} samples of {width}, {rate} a second"
        )
    if width == 1:  # from 0 to 255
        samples = (np.frombuffer(data, np.uint8).astype(np.int16) - 128) << 8
    else:
        highest = np.frombuffer(data, np.uint8).reshape(count, width)[:, -2:]
        samples = np.ascontiguousarray(highest).view("<i2")[:, 0].astype(np.int16)
    return torch.from_numpy(samples), rate


def write_wav(path: Path, waveforms: Iterable[Tensor], sample_rate: int) -> None:
    """Waveforms of one channel in [-1, 1], one behind the other, as each arrives."""
    # Opened here: a wave that cannot open its file prints a traceback when it is deleted.
    with (
        written_whole(path) as partial,
        partial.open("wb") as opened,
        wave.open(opened, "wb") as file,
    ):
        file.setparams((1, 2, sample_rate, 0, "NONE", "not compressed"))
        for waveform in waveforms:
            file.writeframes(to_pcm(waveform))


def to_pcm(waveform: Tensor) -> bytes:
    """Samples in [-1, 1] as little-endian integers of 16 bits."""
    return to_int16(waveform).cpu().numpy().astype("<i2").tobytes()


def to_int16(waveform: Tensor) -> Tensor:
    """Samples in [-1, 1], of any shape, as int16 (samples,)."""
    return (waveform.float().flatten() * 32767).round().to(torch.int16)
