"""Mel spectrograms beside transformers' filters and numpy's transform."""

import numpy as np
import pytest
import torch

from aigc_fast.models.vocoder import MelConfig, MelSpectrogram
from aigc_fast.models.vocoder.mel import mel_filters

CONFIGS = [
    MelConfig(),
    MelConfig(16000, 512, 200, 400, 40, 55.0, None),
    MelConfig(num_mels=20, fmax=700.0),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_filters_are_those_of_slaney(config):
    audio = pytest.importorskip("transformers").audio_utils
    want = audio.mel_filter_bank(
        config.n_fft // 2 + 1, config.num_mels, config.fmin, config.highest,
        config.sampling_rate, norm="slaney", mel_scale="slaney",
    )  # fmt: skip
    np.testing.assert_allclose(mel_filters(config), want.T, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("config", CONFIGS[:2])
def test_frames_are_those_of_numpy(config):
    x = torch.randn(2, 10 * config.hop_size, generator=torch.Generator().manual_seed(0)) * 0.1
    x[1] = 0
    edge, frames = (config.n_fft - config.hop_size) // 2, []
    window = np.zeros(config.n_fft)  # shorter ones stand in the middle
    start = (config.n_fft - config.win_size) // 2
    window[start : start + config.win_size] = np.hanning(config.win_size + 1)[:-1]
    padded = np.pad(x.double().numpy(), ((0, 0), (edge, edge)), "reflect")
    for first in range(0, padded.shape[1] - config.n_fft + 1, config.hop_size):
        bins = np.fft.rfft(padded[:, first : first + config.n_fft] * window)
        frames.append(np.sqrt(np.abs(bins) ** 2 + 1e-9) @ mel_filters(config).numpy().T)
    want = np.log(np.maximum(np.stack(frames, 2), 1e-5))
    got = MelSpectrogram(config)(x)
    assert got.shape == (2, config.num_mels, 10)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert torch.equal(got, MelSpectrogram(config)(x[:, None]))


def test_gradients_are_finite_where_there_is_silence():
    x = torch.zeros(1, 1024, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        mel = MelSpectrogram(MelConfig())(x)
    assert mel.dtype == torch.float32
    assert torch.autograd.grad(mel.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(n_fft=0), "n_fft must be an integer"),
        (dict(num_mels="80"), "num_mels must be an integer"),
        (dict(sampling_rate=0), "sampling_rate must be a positive integer"),
        (dict(hop_size=255), "hop_size must be n_fft"),
        (dict(hop_size=2048), "hop_size must be n_fft"),
        (dict(win_size=2048), "win_size must be at most n_fft"),
        (dict(fmax=12000.0), "fmax must be above fmin"),
        (dict(fmin=9000.0), "fmax must be above fmin"),
        (dict(fmax=float("nan")), "fmax must be in hertz"),
        (dict(fmin=None), "fmin must be in hertz"),
    ],
)
def test_unsound_numbers_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        MelConfig(**changes)


def test_other_shapes_are_refused():
    for shape in ((1024,), (1, 2, 1024)):
        with pytest.raises(ValueError, match="x must be"):
            MelSpectrogram(MelConfig())(torch.zeros(shape))


def test_they_are_of_float32_whatever_the_default_is():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        mel = MelSpectrogram(MelConfig())(torch.zeros(1, 1024))
    finally:
        torch.set_default_dtype(before)
    assert mel.dtype == torch.float32


@pytest.mark.parametrize(("hop_size", "least"), [(256, 385), (512, 512), (1024, 1024)])
def test_sound_is_long_enough_for_a_frame(hop_size, least):
    mel = MelSpectrogram(MelConfig(hop_size=hop_size))
    assert mel(torch.zeros(1, least)).shape == (1, 80, least // hop_size)
    with pytest.raises(ValueError, match=f"at least {least} samples"):
        mel(torch.zeros(1, least - 1))
