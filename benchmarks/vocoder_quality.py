"""How close vocoders come to utterances that no training saw, and Griffin and Lim's algorithm from
the same mel spectrograms.

    python -m benchmarks.vocoder_quality FOLDER [FOLDER ...] [--data voice]

Each folder is one of `aigc-fast train vocoder`, trained on that data. Both distances are 0 for the
utterance itself; a new generator is what the training began with.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from aigc_fast.cli.vocoder_data import load_speech, split
from aigc_fast.models.vocoder import MelSpectrogram
from aigc_fast.models.vocoder.configs import load_vocoder, mel_config, vocoder_class

#: size of the transform, of its hop and of its window
_RESOLUTIONS = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))
_ITERATIONS = 60


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--data", default="voice", help="as of the training")
    options = parser.parse_args()
    waveforms, rate = load_speech(options.data, torch.device("cpu"))
    held_out = [w[None] / 32768 for w in split(waveforms, rate)[1]]
    print("| | log-mel L1 | multi-resolution STFT |\n|---|---|---|")
    for folder in options.folders:
        model, config = load_vocoder(folder / "generator.safetensors")
        mel = MelSpectrogram(mel_config(config))
        torch.manual_seed(0)
        new = vocoder_class(config).from_config(config).eval()
        for name, vocoder in (
            (f"{folder}", model),
            ("a new generator", new),
            ("Griffin-Lim", lambda x, mel=mel: griffin_lim(x, mel)),
        ):
            print(_row(name, vocoder, held_out, mel), flush=True)


@torch.inference_mode()
def _row(
    name: str, vocoder: Callable[[Tensor], Tensor], held_out: list[Tensor], mel: MelSpectrogram
) -> str:
    distances = []
    for real in held_out:
        made = vocoder(mel(real))[:, 0]
        real = real[:, : made.shape[1]]
        distances.append([F.l1_loss(mel(made), mel(real)).item(), stft_distance(made, real)])
    first, second = torch.tensor(distances).mean(0).tolist()
    return f"| {name} | {first:.3f} | {second:.3f} |"


def stft_distance(made: Tensor, real: Tensor) -> float:
    """The mean over resolutions of ||S - M|| / ||S|| + mean |log S - log M|, S and M magnitudes of
    the real and the made waveform, each (batch, samples).

    Source: Yamamoto et al. 2020, arXiv:1910.11480.
    """
    total = 0.0
    for size, hop, width in _RESOLUTIONS:
        window = torch.hann_window(width)
        m, s = (
            torch.stft(x, size, hop, width, window, return_complex=True).abs().clamp(min=1e-5)
            for x in (made, real)
        )
        total += ((s - m).norm() / s.norm() + (s.log() - m.log()).abs().mean()).item()
    return total / len(_RESOLUTIONS)


def griffin_lim(x: Tensor, mel: MelSpectrogram) -> Tensor:
    """A waveform (1, 1, samples) whose spectrogram comes close to x, (1, bands, frames): the least
    magnitudes that have these bands, at random phases that come to fit each other.

    Source: Griffin & Lim 1984; steps of momentum 0.99 by Perraudin et al. 2013.
    """
    c = mel.config
    magnitudes = (torch.linalg.pinv(mel.filters) @ x.exp()).clamp(min=0)
    how = c.n_fft, c.hop_size, c.win_size, mel.window
    random = torch.Generator().manual_seed(0)
    phases = torch.polar(
        torch.ones_like(magnitudes), 2 * torch.pi * torch.rand(magnitudes.shape, generator=random)
    )
    before = torch.zeros_like(phases)
    for _ in range(_ITERATIONS):
        waveform = torch.istft(magnitudes * phases, *how)
        after = torch.stft(waveform, *how, return_complex=True)
        phases = after + 0.99 * (after - before)
        phases, before = phases / phases.abs().clamp(min=1e-12), after
    waveform = torch.istft(magnitudes * phases, *how)
    # Frames of ours have their hop in their middle, those of torch begin in the middle of one.
    return F.pad(waveform, (c.hop_size // 2, c.hop_size // 2))[:, None]


if __name__ == "__main__":
    main()
