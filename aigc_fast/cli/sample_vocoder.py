"""A sound from its own mel spectrogram: what a vocoder can do."""

import time

import torch
from rich.console import Console

from aigc_fast._devices import default_device
from aigc_fast.io import read_wav, write_wav
from aigc_fast.models.vocoder import MelSpectrogram
from aigc_fast.models.vocoder.configs import load_vocoder, mel_config

from .sample import VocoderOptions


@torch.inference_mode()
def run(console: Console, options: VocoderOptions) -> None:
    device = default_device()
    model, config = load_vocoder(options.checkpoint)
    mel = MelSpectrogram(mel_config(config)).to(device)
    model = model.to(device)
    waveform, rate = read_wav(options.sound)
    if rate != (wanted := mel.config.sampling_rate):
        raise ValueError(f"{options.sound}: must have {wanted} samples a second, has {rate}")
    try:
        frames = mel(waveform[None].to(device) / 32768)
    except ValueError as error:
        raise ValueError(f"{options.sound}: {error}") from None
    start = time.perf_counter()
    made = model(frames).cpu()  # waits for a GPU
    elapsed = time.perf_counter() - start
    write_wav(options.output, [made], rate)
    seconds = made.shape[2] / rate
    console.print(
        f"{options.output}: {seconds:.1f} s of audio; real-time factor {elapsed / seconds:.3f}",
        markup=False,
        soft_wrap=True,
    )
