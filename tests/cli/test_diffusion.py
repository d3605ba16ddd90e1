"""`aigc-fast train diffusion` and `aigc-fast sample diffusion`, as a user runs them."""

import csv
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("mlxtend")
pytest.importorskip("safetensors")

from PIL import Image
from torch import nn
from typer.testing import CliRunner

from aigc_fast import schedulers
from aigc_fast.cli import train_diffusion, training_session
from aigc_fast.cli.app import app
from aigc_fast.cli.diffusion_model import load_model, save_model, to_sample_from
from aigc_fast.cli.pictures import save_videos
from aigc_fast.cli.sample import DiffusionOptions
from aigc_fast.cli.sample_diffusion import samples_of
from aigc_fast.cli.schedulers import make_scheduler, names_for
from aigc_fast.models.diffusion import sample
from aigc_fast.training.denoising import PREDICTIONS, Denoising

SMALL = ("--class-conditional", "--channels", 8, "--batch", 4, "--every", 3)


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "100"})


def train(output, *more):
    return run("train", "diffusion", *SMALL, "--output", output, *more)


def losses(output):
    with (output / "log.csv").open() as file:
        return [(row["step"], row["loss"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    output = tmp_path_factory.mktemp("trained")
    result = train(output, "--steps", 6)
    assert result.exit_code == 0, result.output
    assert "6 steps of 4 images" in result.output and "0 updates skipped" in result.output
    return output


def test_goes_on_to_the_bit_after_a_kill(trained, tmp_path):
    command = [sys.executable, "-c", "from aigc_fast.cli import main; main()", "train", "diffusion"]
    output = tmp_path / "out"
    process = subprocess.Popen(
        [*command, *map(str, SMALL), "--steps", "6", "--output", str(output)],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    while not (output / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert len(losses(output)) < len(losses(trained))
    result = train(output, "--steps", 6, "--resume")
    assert result.exit_code == 0, result.output
    assert losses(output) == losses(trained)
    weights = [
        load_model(p / "model.safetensors", "cpu")[0].state_dict() for p in (output, trained)
    ]
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_training_writes_its_files_and_never_over_another(trained):
    names = {file.name for file in trained.iterdir()}
    assert names == {"checkpoint.pt", "log.csv", "losses.png", "model.safetensors", "samples.png"}
    assert Image.open(trained / "samples.png").size == (10 * 32 * 3, 4 * 32 * 3)
    again = train(trained, "--steps", 8)
    assert again.exit_code == 2 and "--resume goes on from it" in again.output.replace("\n", "")
    other = train(trained, "--steps", 8, "--resume", "--prediction", "flow")
    assert other.exit_code == 2 and "is of other networks" in other.output.replace("\n", "")
    assert len(losses(trained)) == 2


def test_samples_as_picture_and_film(trained, tmp_path):
    options = ("--checkpoint", trained / "model.safetensors", "--steps", 3, "--count", 4)
    picture, film = tmp_path / "seven.png", tmp_path / "seven.gif"
    result = run(
        "sample", "diffusion", *options, "--guidance", 3, "--label", 7, "--output", picture
    )
    assert result.exit_code == 0, result.output
    assert Image.open(picture).size == (4 * 32 * 3, 32 * 3)
    result = run("sample", "diffusion", *options, "--scheduler", "ddim", "--output", film)
    assert result.exit_code == 0, result.output
    assert Image.open(film).n_frames == 3


def test_suffixes_in_capitals(trained, tmp_path):
    pytest.importorskip("av")
    options = ("--checkpoint", trained / "model.safetensors", "--steps", 2, "--count", 2)
    for name in ("some.PNG", "some.Gif", "some.MP4"):
        result = run("sample", "diffusion", *options, "--output", tmp_path / name)
        assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "some.PNG").format == "PNG"
    assert Image.open(tmp_path / "some.Gif").n_frames == 2
    assert len(frames_of(tmp_path / "some.MP4")[0]) == 1 + 1600 // 80


def test_flow_without_labels(monkeypatch, tmp_path):
    images, labels = training_session.load_digits()
    monkeypatch.setattr(training_session, "load_digits", lambda: (images[::100], labels[::100]))
    small = ("--channels", 8, "--batch", 8, "--prediction", "flow", "--output", tmp_path)
    assert run("train", "diffusion", *small, "--minutes", 0.001).exit_code == 0
    assert len(losses(tmp_path)) == 1
    options = ("--checkpoint", tmp_path / "model.safetensors", "--steps", 2, "--count", 1)
    options += ("--output", tmp_path / "one.png")
    for scheduler in ("flow_euler", "dpmpp_2m", "unipc"):
        result = run("sample", "diffusion", *options, "--scheduler", scheduler)
        assert result.exit_code == 0, result.output
    for more, words in (
        (("--scheduler", "ddim"), "flow_lcm, unipc for flow prediction, got 'ddim'"),
        (("--label", 0), "label must be a class of the model, which has none"),
        (("--guidance", 2), "guidance must be 1 for a model without classes"),
    ):
        result = run("sample", "diffusion", *options, "--scheduler", "flow_euler", *more)
        assert result.exit_code == 2 and words in result.output.replace("\n", " ")


def test_trains_on_a_folder_of_images(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(4):
        Image.new("RGB", (20, 30), (60 * i, 90, 9)).save(tmp_path / "images" / f"{i}.png")
    options = ("--data", tmp_path / "images", "--size", 16, "--steps", 1)
    result = train(tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "out" / "samples.png").mode == "RGB"


def test_videos_as_frames_and_as_film(monkeypatch, tmp_path):
    videos, labels = training_session.load_moving_digits(8, size=24)
    monkeypatch.setattr(training_session, "load_moving_digits", lambda size: (videos, labels))
    out = tmp_path / "out"
    options = ("--data", "moving-digits", "--size", 24, "--patch", 2, 4, 8, "--batch", 4)
    result = train(out, *options, "--steps", 2, "--gradient-checkpointing")
    assert result.exit_code == 0, result.output
    frame = (24 + 2 * 2) * 3
    assert Image.open(out / "samples.png").size == (8 * frame, 10 * frame)
    assert Image.open(out / "samples.gif").n_frames == 8
    result = train(out, *options, "--steps", 3, "--gradient-checkpointing", "--resume")
    assert result.exit_code == 0, result.output
    options = ("--checkpoint", out / "model.safetensors", "--steps", 2, "--count", 2)
    options += ("--label", int(labels.max()), "--guidance", 2)
    for name, size in (("some.png", (8 * frame, 2 * frame)), ("some.gif", (2 * frame, frame))):
        result = run("sample", "diffusion", *options, "--output", tmp_path / name)
        assert result.exit_code == 0, result.output
        assert Image.open(tmp_path / name).size == size
    # The film has eight frames, as long as each other.
    film = Image.open(tmp_path / "some.gif")
    film.seek(7)
    assert film.info["duration"] == 80


def frames_of(path):
    av = pytest.importorskip("av")
    with av.open(path) as container:
        (stream,) = container.streams
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return np.stack(frames), float(stream.average_rate), stream.codec_context.name


@pytest.mark.parametrize("channels", [1, 3])
def test_videos_as_mp4(channels, tmp_path):
    pytest.importorskip("av")
    videos = torch.linspace(-1, 1, 8)[None, None, :, None, None].expand(3, channels, 8, 9, 11)
    save_videos(tmp_path / "some.mp4", videos)
    frames, rate, codec = frames_of(tmp_path / "some.mp4")
    # 9 + 4 pixels, three times as large, and one black row
    assert frames.shape == (8, 40, 3 * 15 * 3 + 1, 3) and (rate, codec) == (12.5, "h264")
    middle = frames[:, 15:24, 15:24].reshape(8, -1).mean(1)
    assert np.abs(middle - np.linspace(0, 255, 8)).max() < 4
    assert frames[:, -1].max() < 40


def test_images_that_form_as_mp4(trained, tmp_path):
    pytest.importorskip("av")
    options = ("--checkpoint", trained / "model.safetensors", "--steps", 3, "--count", 4)
    result = run("sample", "diffusion", *options, "--output", tmp_path / "some.mp4")
    assert result.exit_code == 0, result.output
    frames, *_ = frames_of(tmp_path / "some.mp4")
    assert len(frames) == 2 + 1600 // 80 and (frames[2] == frames[-1]).mean() > 0.5


def test_mp4_without_its_package(trained, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "av" else find(name)
    )
    options = ("--checkpoint", trained / "model.safetensors", "--output", tmp_path / "some.mp4")
    result = run("sample", "diffusion", *options)
    assert result.exit_code == 2 and "pip install 'aigc_fast[video]'" in result.output


class Knowing(nn.Module):
    """A model that has learnt one sample by heart."""

    truth = torch.linspace(-1, 1, 12).reshape(1, 3, 2, 2)

    def __init__(self, prediction):
        super().__init__()
        self.prediction, self.place = prediction, nn.Parameter(torch.zeros(()))
        self.scheduler = Denoising(prediction, "cosine").scheduler()

    def forward(self, noisy, timesteps, labels=None):
        alpha, sigma = (v[:, None, None, None] for v in self.scheduler.levels(timesteps))
        noise = (noisy - alpha * self.truth) / sigma.clamp(min=1e-4)
        predictions = {"epsilon": noise, "v": alpha * noise - sigma * self.truth}
        return predictions.get(self.prediction, noise - self.truth)


#: Of models with noise levels of their own, and the way from an image to its noise.
OTHERS = {
    "CMStochasticIterativeScheduler", "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler",
    "IPNDMScheduler", "DDIMInverseScheduler",
}  # fmt: skip


def test_every_scheduler_that_suits_has_a_name():
    found = {
        type(make_scheduler(name, prediction, "linear"))
        for prediction in PREDICTIONS
        for name in names_for(prediction)
    }
    known = {getattr(schedulers, name) for name in {*schedulers.__all__} - {"Row", "Scheduler"}}
    assert {cls.__name__ for cls in known - found} == OTHERS and found <= known
    assert {"dpmpp_2m", "ddim", "unipc", "euler_ancestral", "heun"} <= set(names_for("v"))
    assert {"dpmpp_2m", "unipc", "flow_euler", "flow_lcm"} <= set(names_for("flow"))


@pytest.mark.parametrize(
    ("prediction", "name"), [(p, name) for p in PREDICTIONS for name in names_for(p)]
)
def test_schedulers_are_of_the_models_noise(name, prediction):
    """They find what the model knows, from the noise that they begin with."""
    scheduler = make_scheduler(name, prediction, "cosine")
    if prediction != "flow":
        assert scheduler.beta_schedule == "squaredcos_cap_v2"
        assert scheduler.prediction_type.startswith(prediction)
    found = sample(Knowing(prediction), scheduler, Knowing.truth.shape, num_steps=20, seed=0)
    assert (found - Knowing.truth).abs().max() < 0.05


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("prediction", ["v", "flow"])
def test_few_steps_leave_no_noise(prediction, steps):
    for name in names_for(prediction):
        scheduler = make_scheduler(name, prediction, "cosine")
        if getattr(scheduler, "order", 1) == 1:  # two stages need smaller steps
            found = sample(
                Knowing(prediction), scheduler, Knowing.truth.shape, num_steps=steps, seed=0
            )
            assert (found - Knowing.truth).abs().max() < 0.2, name


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("name", names_for("epsilon"))
def test_an_error_of_epsilon_is_not_amplified(name, schedule):
    """Where hardly any signal is left it would be thousands of times as large in the sample, and a
    network, which has seen no such samples, does not find back."""

    class Erring(Knowing):
        def forward(self, noisy, timesteps, labels=None):
            epsilon = super().forward(noisy, timesteps) + 0.02 * noisy.roll(1, -1)
            return epsilon.clamp(-4, 4)

    model = Erring("epsilon")
    model.scheduler = Denoising("epsilon", schedule).scheduler()
    config = {"prediction": "epsilon", "schedule": schedule}
    scheduler = make_scheduler(name, **config)
    found = sample(
        to_sample_from(model, config), scheduler, model.truth.shape, num_steps=20, seed=0
    )
    assert (found - model.truth).abs().max() < 0.2


def test_samples_of_epsilon_are_within_the_range_of_pixels(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        train_diffusion, "save_grid", lambda path, images, columns: drawn.append(images)
    )
    assert train(tmp_path, "--prediction", "epsilon", "--steps", 1).exit_code == 0
    options = DiffusionOptions(checkpoint=tmp_path / "model.safetensors", count=2)
    drawn.append(samples_of(options, torch.device("cpu"))[0])
    assert len(drawn) == 2 and all(images.abs().max() < 1.25 for images in drawn)


@pytest.mark.parametrize("name", names_for("v"))
def test_schedulers_end_within_the_range_of_pixels(name):
    """With a trained model, which is right about nothing but what it has seen: a step from where
    all is noise must not throw it out of that."""
    checkpoint = Path(__file__).parents[2] / "docs" / "diffusion" / "digits_v.safetensors"
    options = DiffusionOptions(checkpoint=checkpoint, scheduler=name, count=2, guidance=3, label=7)
    images, _ = samples_of(options, torch.device("cpu"))
    assert (images.abs() > 1.25).float().mean() < 0.02


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--data", "nowhere"), "data must be digits, moving-digits or a folder"),
        (("--prediction", "x0"), "prediction must be one of epsilon, v, flow"),
        (("--batch", 5001), "batch must be at most 5000"),
        (("--channels", 5), "channels must be a multiple of 8, got 5"),
        (("--size", 27), "size must be 28 for the digits, got 27"),
        (
            ("--data", "moving-digits", "--size", 20, "--patch", 3, 4, 4),
            "patch must divide the videos, (8, 20, 20) frames, rows and columns, got (3, 4, 4)",
        ),
        (("--data", "moving-digits", "--size", 12), "size must be at least 16, got 12"),
        (("--data", "moving-digits", "--size", 10**6), "size must be less: 10000 samples"),
        (("--channels", 8 * 10**5), "out of memory: less of --size, --channels and --batch"),
        (("--resume",), "checkpoint.pt"),
    ],
)
def test_training_refuses(options, words, tmp_path):
    result = train(tmp_path / "out", *options)
    assert result.exit_code == 2
    assert words in result.output.replace("\n", " ")


def test_sampling_refuses(trained, tmp_path):
    path = tmp_path / "model.safetensors"
    whole = (trained / "model.safetensors").read_bytes()
    model, config = load_model(trained / "model.safetensors", torch.device("cpu"))
    for content in (whole[: len(whole) // 2], b"text"):
        path.write_bytes(content)
        result = run("sample", "diffusion", "--checkpoint", path)
        assert result.exit_code == 2
        assert "not the model.safetensors of a diffusion" in result.output.replace("\n", " ")
    save_model(path, model, {**config, "channels": [8, 16, 32]})
    result = run("sample", "diffusion", "--checkpoint", path)
    assert result.exit_code == 2 and "down.2.conv1.weight" in result.output.replace("\n", "")
    options = ("--checkpoint", trained / "model.safetensors")
    result = run("sample", "diffusion", *options, "--scheduler", "magic")
    assert result.exit_code == 2 and "scheduler must be one of ddim" in result.output
    result = run("sample", "diffusion", *options, "--output", tmp_path / "x.jpg")
    assert result.exit_code == 2 and "output must be a .png, .gif or .mp4" in result.output


@pytest.mark.parametrize("name", ["digits_v", "digits_flow"])
def test_the_models_in_the_docs(name, tmp_path):
    checkpoint = Path(__file__).parents[2] / "docs" / "diffusion" / f"{name}.safetensors"
    options = ("--checkpoint", checkpoint, "--label", 7, "--guidance", 2, "--count", 20)
    result = run("sample", "diffusion", *options, "--steps", 10, "--output", tmp_path / "7.png")
    assert result.exit_code == 0, result.output
    images = torch.from_numpy(np.array(Image.open(tmp_path / "7.png"))).float() / 127.5 - 1
    # A seven has its bar above and its foot below the middle: more ink in the upper half.
    rows = images.view(2, 96, 10, 96)[:, 6:90, :, 6:90]
    assert ((rows[:, :42] > 0).sum() > 1.2 * (rows[:, 42:] > 0).sum()).item()


def test_the_video_model_in_the_docs(tmp_path):
    checkpoint = Path(__file__).parents[2] / "docs" / "diffusion" / "moving_digits.safetensors"
    assert checkpoint.stat().st_size < 5e6
    options = ("--checkpoint", checkpoint, "--label", 7, "--guidance", 2, "--count", 4)
    result = run("sample", "diffusion", *options, "--steps", 10, "--output", tmp_path / "7.png")
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "7.png").size == (8 * 20 * 3, 4 * 20 * 3)
