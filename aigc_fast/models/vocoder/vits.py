"""VITS: text to speech in one network."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from .checks import check_scale
from .duration import DurationPredictor, StochasticDurationPredictor
from .flow import ResidualCouplingFlow
from .hifigan import HiFiGANGenerator
from .layers import length_mask
from .text_encoder import TextEncoder
from .vits_config import VITSConfig

#: frames of one row that are not refused: 12 minutes of 22.05 kHz with a hop of 256
LONGEST = 1 << 16


class VITS(nn.Module):
    """Phonemes, or characters, to waveforms. For inference: it has no posterior encoder.

    Names of the state dict are the original's. Attributes: `config`, `hop` (samples of a frame).

    >>> model = VITS.from_pretrained("en_US-joe-medium.onnx")
    >>> waveform, lengths = model.synthesize(torch.tensor([[1, 20, 59, 24, 120, 27, 10, 2]]))

    Source: Kim et al. 2021, arXiv:2106.06103.
    """

    def __init__(self, config: VITSConfig) -> None:
        super().__init__()
        self.config = c = config
        self.enc_p = TextEncoder(
            c.vocab_size, c.latent_channels, c.hidden_channels, c.filter_channels, c.num_heads,
            c.num_layers, c.kernel_size, c.window,
        )  # fmt: skip
        self.dp: StochasticDurationPredictor | DurationPredictor
        if c.stochastic_duration:
            self.dp = StochasticDurationPredictor(
                c.hidden_channels, c.duration_kernel_size, c.duration_layers, c.duration_bins,
                c.duration_flows, c.speaker_channels,
            )  # fmt: skip
        else:
            self.dp = DurationPredictor(
                c.hidden_channels, c.duration_channels, c.duration_kernel_size, c.speaker_channels
            )
        self.flow = ResidualCouplingFlow(
            c.flow_couplings, c.latent_channels, c.hidden_channels, c.wavenet_kernel_size,
            c.wavenet_dilation_rate, c.wavenet_layers, c.speaker_channels,
        )  # fmt: skip
        channels = dict(in_channels=c.latent_channels, speaker_channels=c.speaker_channels)
        self.dec = HiFiGANGenerator(**c.decoder | channels, bias=False)
        several = c.num_speakers > 1
        self.emb_g = nn.Embedding(c.num_speakers, c.speaker_channels) if several else None
        self.hop = self.dec.hop

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], dtype: torch.dtype | None = None
    ) -> VITS:
        """Reads a voice of Piper or of Hugging Face.

        path:  Piper's .onnx file, with its .onnx.json beside it; or the folder that save_pretrained
               of transformers' VitsModel wrote (config.json and safetensors).
        dtype: of the weights; None for that of the file's embedding of phonemes.

        OSError where a file cannot be opened, ValueError where one is unsound or of another
        network, ImportError where the package that reads it is missing.
        """
        from .load_hf import load_hf
        from .load_piper import load_piper

        model = (load_hf if Path(path).is_dir() else load_piper)(path)
        return model.to(model.enc_p.emb.weight.dtype if dtype is None else dtype)

    @torch.inference_mode()
    def synthesize(
        self,
        ids: Tensor,
        lengths: Tensor | None = None,
        *,
        noise_scale: float | None = None,
        length_scale: float | None = None,
        noise_scale_duration: float | None = None,
        speaker: Tensor | int | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Waveforms (batch, 1, samples) in [-1, 1] and their lengths in samples, int64 (batch,).

        ids:          int64 (batch, n), at least 0 and below vocab_size.
        lengths:      int64 (batch,), of each row in ids, 1 to n; None for n. Each row then gives
                      what it gives alone, and zeros follow a shorter waveform.
        noise_scale:  deviation of latents, in units of the model's own: how varied speech is.
        length_scale: 2 speaks half as fast.
        noise_scale_duration: deviation of what durations are made of; 0 is always the same.
                      Without effect where they are not drawn.
        speaker:      one for all rows or int64 (batch,), for a model of several speakers alone.
        generator:    of the noise; on the device of ids.

        A scale of None is the voice's own. Without noise the result is a function of ids.

        ValueError for arguments that will not do, and where a row becomes longer than 65536 frames.
        """
        c = self.config
        length_scale = check_scale("length_scale", _given(length_scale, c.length_scale))
        noise_scale = check_scale("noise_scale", _given(noise_scale, c.noise_scale))
        noise_scale_duration = check_scale(
            "noise_scale_duration", _given(noise_scale_duration, c.noise_scale_duration)
        )
        lengths = self._check_ids(ids, lengths)
        dtype = self.enc_p.emb.weight.dtype
        condition = self._condition(speaker, ids)

        def draw(*shape: int) -> Tensor:
            wide = torch.promote_types(dtype, torch.float32)
            return torch.randn(shape, generator=generator, device=ids.device, dtype=wide).to(dtype)

        mask = length_mask(lengths, ids.shape[1], dtype)
        states, mean, log_deviation = self.enc_p(ids, mask)
        if isinstance(self.dp, StochasticDurationPredictor):
            noise = draw(len(ids), 2, ids.shape[1]) * noise_scale_duration
            log_durations = self.dp(states, mask, condition, noise)
        else:
            log_durations = self.dp(states, mask, condition)
        ends = self._durations(log_durations[:, 0], lengths, length_scale).cumsum(1)
        frames = ends[:, -1].clamp(min=1)
        longest = int(frames.max())
        # The phoneme of each frame: the first that ends after it.
        at = torch.arange(longest, device=ids.device).expand(len(ids), -1)
        phoneme = torch.searchsorted(ends, at.contiguous(), right=True)
        phoneme = torch.minimum(phoneme, lengths[:, None] - 1)[:, None].expand(
            -1, c.latent_channels, -1
        )
        mean, log_deviation = mean.gather(2, phoneme), log_deviation.gather(2, phoneme)
        z = mean + draw(*mean.shape) * log_deviation.exp() * noise_scale
        z = self.flow(z, length_mask(frames, longest, dtype), condition)
        return self._decode(z, frames, condition), frames * self.hop

    def _durations(self, logarithms: Tensor, lengths: Tensor, length_scale: float) -> Tensor:
        """Frames of each phoneme, int64 (batch, n); what lies beyond a row has none."""
        wide = torch.promote_types(logarithms.dtype, torch.float32)
        durations = (logarithms.to(wide).exp() * length_scale).ceil()
        inside = torch.arange(durations.shape[1], device=durations.device) < lengths[:, None]
        durations = torch.where(inside, durations, 0)
        if not bool((durations.sum(1) <= LONGEST).all()):  # nor where it is NaN
            found = durations.sum(1).tolist()
            raise ValueError(f"ids must become at most {LONGEST} frames a row, got {found}")
        return durations.long()

    def _decode(self, z: Tensor, frames: Tensor, condition: Tensor | None) -> Tensor:
        """Waveforms; rows of unequal lengths one by one, as convolutions see beyond their ends."""
        if bool((frames == z.shape[2]).all()):
            return self.dec(z, condition)
        waveform = z.new_zeros(len(z), 1, z.shape[2] * self.hop)
        for row, length in enumerate(frames.tolist()):
            one = None if condition is None else condition[row : row + 1]
            part = self.dec(z[row : row + 1, :, :length], one)
            waveform[row : row + 1, :, : part.shape[2]] = part
        return waveform

    def _condition(self, speaker: Tensor | int | None, ids: Tensor) -> Tensor | None:
        """A vector (batch, speaker_channels, 1), or None."""
        if (speaker is None) != (self.emb_g is None):
            count = self.config.num_speakers
            raise ValueError(
                f"speaker must be in [0, {count}), got None"
                if speaker is None
                else f"speaker must be left out: the voice has one speaker, got {speaker}"
            )
        if speaker is None or self.emb_g is None:
            return None
        which = torch.as_tensor(speaker, device=ids.device)
        if which.dim() == 0:
            which = which.expand(len(ids))
        _check_indices("speaker", which, (len(ids),), 0, self.config.num_speakers)
        return self.emb_g(which)[:, :, None]

    def _check_ids(self, ids: Tensor, lengths: Tensor | None) -> Tensor:
        if not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.numel():
            raise ValueError("ids must be a tensor (batch, n) with at least one id")
        _check_indices("ids", ids, ids.shape, 0, self.config.vocab_size)
        if lengths is None:
            return torch.full((len(ids),), ids.shape[1], device=ids.device)
        _check_indices("lengths", lengths, ids.shape[:1], 1, ids.shape[1] + 1)
        return lengths.to(ids.device)


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def _check_indices(name: str, value: Tensor, shape: tuple[int, ...], least: int, end: int) -> None:
    if value.dtype != torch.int64 or value.shape != shape:
        found = f"{value.dtype} {tuple(value.shape)}"
        raise ValueError(f"{name} must be int64 of shape {tuple(shape)}, got {found}")
    if not bool(((value >= least) & (value < end)).all()):
        raise ValueError(f"{name} must be in [{least}, {end}), got {value.min()} to {value.max()}")
