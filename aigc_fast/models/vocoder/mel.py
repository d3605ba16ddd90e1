"""Log-mel spectrograms as HiFi-GAN defines them: what its vocoders read, and are judged by."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, log

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_size

#: magnitudes of a band are no lower than this, and squares of a bin have the other added
_FLOOR, _IN_ROOT = 1e-5, 1e-9


@dataclass(frozen=True)
class MelConfig:
    """How sound becomes a spectrogram; the names are those of the published config.json.

    sampling_rate: samples a second.
    n_fft, win_size, hop_size: samples of a transform, of its Hann window, from one to the next.
    num_mels:      bands, evenly spaced in mel from fmin to fmax (Hz; None for half the rate).

    ValueError names a number that will not do.
    """

    sampling_rate: int = 22050
    n_fft: int = 1024
    hop_size: int = 256
    win_size: int = 1024
    num_mels: int = 80
    fmin: float = 0.0
    fmax: float | None = 8000.0

    def __post_init__(self) -> None:
        for name in ("n_fft", "hop_size", "win_size", "num_mels"):
            check_size(name, getattr(self, name))
        if type(self.sampling_rate) is not int or not 1 <= self.sampling_rate < 1 << 32:
            raise ValueError(f"sampling_rate must be a positive integer, got {self.sampling_rate}")
        if not self.hop_size <= self.n_fft or (self.n_fft - self.hop_size) % 2:
            raise ValueError(
                f"hop_size must be n_fft ({self.n_fft}) less an even number, got {self.hop_size}"
            )
        if self.win_size > self.n_fft:
            raise ValueError(f"win_size must be at most n_fft ({self.n_fft}), got {self.win_size}")
        for name, value in (("fmin", self.fmin), ("fmax", self.highest)):
            if type(value) not in (int, float) or not 0 <= value < inf:
                raise ValueError(f"{name} must be in hertz, got {value!r}")
        if not self.fmin < self.highest <= self.sampling_rate / 2:
            raise ValueError(
                f"fmax must be above fmin ({self.fmin}) and at most half of sampling_rate "
                f"({self.sampling_rate}), got {self.fmax}"
            )

    @property
    def least(self) -> int:
        """Samples that sound must have."""
        return _least(self.n_fft, self.hop_size)

    @property
    def highest(self) -> float:
        return self.sampling_rate / 2 if self.fmax is None else self.fmax


class MelSpectrogram(nn.Module):
    """Waveforms (batch, samples) or (batch, 1, samples) in [-1, 1] to logarithms of mel bands,
    (batch, num_mels, samples // hop_size), in float32.

        log(max(filters @ sqrt(|stft(x)|^2 + 1e-9), 1e-5))

    x is continued by its reflection, (n_fft - hop_size) / 2 samples on either side, so that a frame
    has its hop in its middle. Differentiable; outside autocast, whose bfloat16 is too coarse.

    Raises ValueError for another shape, or fewer samples than `config.least`.

    Source: Kong et al. 2020, arXiv:2010.05646, and meldataset.py of its authors.
    """

    window: Tensor
    filters: Tensor

    def __init__(self, config: MelConfig) -> None:
        super().__init__()
        self.config = config
        window = torch.hann_window(config.win_size, dtype=torch.float32)
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("filters", mel_filters(config).float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        c = self.config
        if x.dim() not in (2, 3) or (x.dim() == 3 and x.shape[1] != 1):
            raise ValueError(
                f"x must be (batch, samples) or (batch, 1, samples), got {tuple(x.shape)}"
            )
        with torch.autocast(x.device.type, enabled=False):
            power = parts_of_frames(x, c.n_fft, c.hop_size, self.window).square().sum(-1)
            return (self.filters @ (power + _IN_ROOT).sqrt()).clamp(min=_FLOOR).log()


def _least(n_fft: int, hop_size: int) -> int:
    """A reflection is shorter than what it continues, and there is a frame."""
    return max((n_fft - hop_size) // 2 + 1, hop_size)


def parts_of_frames(x: Tensor, n_fft: int, hop_size: int, window: Tensor) -> Tensor:
    """The real and the imaginary parts of the transforms of frames around each hop,
    (batch, n_fft // 2 + 1, samples // hop_size, 2) in float32: see `MelSpectrogram`."""
    if x.shape[-1] < (least := _least(n_fft, hop_size)):
        raise ValueError(f"x must have at least {least} samples, got {tuple(x.shape)}")
    edge = (n_fft - hop_size) // 2
    x = F.pad(x.float().reshape(len(x), 1, -1), (edge, edge), "reflect")[:, 0]
    spectrum = torch.stft(
        x, n_fft, hop_size, len(window), window, center=False, return_complex=True
    )
    return torch.view_as_real(spectrum)


def mel_filters(config: MelConfig) -> Tensor:
    """Weights of the bins of a transform in each band, float64 (num_mels, n_fft // 2 + 1).

    A band is a triangle from the centre of the band below to that of the band above, of area 1 Hz.
    The scale is Slaney's (Auditory Toolbox, 1998): 3 / 200 mel a hertz up to 1000 Hz, from there on
    27 mel for each factor of 6.4.
    """
    ends = torch.tensor([config.fmin, config.highest], dtype=torch.float64)
    knee = 15.0  # mel at 1000 Hz
    above = knee + 27 * (ends.clamp(min=1000) / 1000).log() / log(6.4)
    lowest, highest = torch.where(ends < 1000, ends * knee / 1000, above).tolist()
    mel = torch.linspace(lowest, highest, config.num_mels + 2, dtype=torch.float64)
    hertz = torch.where(mel < knee, mel * 1000 / knee, 1000 * 6.4 ** ((mel - knee) / 27))
    bins = torch.arange(config.n_fft // 2 + 1) * (config.sampling_rate / config.n_fft)
    below, centre, over = hertz[:-2, None], hertz[1:-1, None], hertz[2:, None]
    rising, falling = (bins - below) / (centre - below), (over - bins) / (over - centre)
    return torch.minimum(rising, falling).clamp(min=0) * 2 / (over - below)
