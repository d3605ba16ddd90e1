"""`aigc-fast train vae` and `aigc-fast sample vae`, as a user runs them."""

import csv
import fcntl
import os
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("mlxtend")
pytest.importorskip("safetensors")

from PIL import Image
from typer.testing import CliRunner

from aigc_fast.cli import pictures, training_session
from aigc_fast.cli.app import app
from aigc_fast.cli.vae_model import load_model
from aigc_fast.training import log_likelihood
from aigc_fast.training.batches import as_floats


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "100"})


def train(output, *more):
    small = ("--channels", 8, "--latent-dim", 3, "--batch", 8, "--every", 2, "--output", output)
    return run("train", "vae", *small, *more)


def draw(model, picture, *more):
    return run("sample", "vae", "--checkpoint", model, "--output", picture, *more)


@pytest.fixture(autouse=True)
def few_data(monkeypatch):
    images, labels = training_session.load_digits()
    monkeypatch.setattr(training_session, "load_digits", lambda: (images[::100], labels[::100]))
    videos = torch.zeros(2, 8, 32, 32), torch.zeros(2, 1)
    monkeypatch.setattr(training_session, "load_moving_digits", lambda size: videos)


def test_train_resume_and_sample(tmp_path):
    out = tmp_path / "out"
    assert train(out, "--steps", 2, "--conditional").exit_code == 0
    again = train(out, "--steps", 4, "--conditional")
    assert again.exit_code == 2 and "--resume goes on from it" in again.output.replace("\n", "")
    resumed = train(out, "--steps", 4, "--conditional", "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "4 steps of 8 images" in resumed.output
    for file in ("checkpoint.pt", "model.safetensors", "samples.png", "losses.png"):
        assert (out / file).exists()
    with (out / "log.csv").open() as file:
        found = list(csv.DictReader(file))
    assert [row["step"] for row in found] == ["2", "4"]
    assert all(float(row["reconstruction"]) > 0 and float(row["kl"]) > 0 for row in found)

    model, picture = out / "model.safetensors", tmp_path / "picture.png"
    result = draw(model, picture, "--count", 4, "--label", 7)
    assert result.exit_code == 0, result.output
    assert Image.open(picture).size == (4 * 32 * 3, 32 * 3)
    result = draw(model, picture, "--count", 3, "--show", "interpolations")
    assert result.exit_code == 0, result.output
    assert Image.open(picture).size == (10 * 32 * 3, 3 * 32 * 3)
    result = draw(model, picture, "--show", "reconstructions")
    assert result.exit_code == 0, result.output
    assert Image.open(picture).size == (5 * 32 * 3, 2 * 32 * 3)  # five of fifty are held out
    for options, words in (
        (("--label", 10), "label must be a class of the model"),
        (("--show", "latents"), "show must be one of samples, interpolations, reconstructions"),
        (("--show", "reconstructions", "--data", "nowhere"), "data must be digits"),
    ):
        refused = draw(model, picture, *options)
        assert refused.exit_code == 2 and words in refused.output.replace("\n", " ")


def test_trains_on_a_folder_of_images(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(10):
        color = (25 * i, 200 - 20 * i, 90)
        Image.new("RGB", (40, 30), color).save(tmp_path / "images" / f"{i}.png")
    options = ("--data", tmp_path / "images", "--size", 32, "--likelihood", "gaussian", "--bf16")
    result = train(tmp_path / "out", *options, "--steps", 1, "--minutes", 0.001, "--beta", 0.1)
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "out" / "samples.png").mode == "RGB"
    picture = tmp_path / "again.png"
    show = ("--show", "reconstructions", "--data", tmp_path / "images")
    assert draw(tmp_path / "out" / "model.safetensors", picture, *show).exit_code == 0
    assert Image.open(picture).size == (36 * 3, 2 * 36 * 3)
    wrong = draw(tmp_path / "out" / "model.safetensors", picture, "--show", "reconstructions")
    assert wrong.exit_code == 2 and "size must be 28 for the digits" in wrong.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--likelihood", "poisson"), "likelihood must be one of bernoulli"),
        (("--size", 64), "size must be 28 for the digits"),
        (("--data", "nowhere"), "data must be digits, moving-digits or a folder"),
        (("--data", "moving-digits", "--size", 32), "data must be images for a VAE"),
        (("--batch", 46), "batch must be at most 45"),
        (("--channels", 12), "channels must be a multiple of 8"),
        (("--resume",), "checkpoint.pt"),
    ],
)
def test_refuses(options, words, tmp_path):
    result = train(tmp_path / "out", *options)
    assert result.exit_code == 2
    assert words in result.output.replace("\n", " ")


def test_sample_refuses_what_is_no_model(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"text")
    result = draw(path, tmp_path / "out.png")
    assert result.exit_code == 2
    assert "not the model.safetensors of a vae model" in result.output.replace("\n", " ")


def test_the_model_in_the_docs(tmp_path):
    checkpoint = Path(__file__).parents[2] / "docs" / "vae" / "digits.safetensors"
    assert checkpoint.stat().st_size < 5e6
    assert draw(checkpoint, tmp_path / "samples.png", "--count", 4).exit_code == 0
    model, config = load_model(checkpoint, torch.device("cpu"))
    # Every hundredth digit, and so none that the training saw.
    images, _ = training_session.load_data("digits", 28)
    bound = log_likelihood(model, as_floats(images), samples=5, likelihood=config["likelihood"])
    assert bound.mean() > -115


def test_a_curve_of_one_row_is_seen(tmp_path):
    for losses in ([2.0], [2.0, 3.0]):
        pictures.save_losses(tmp_path / "losses.png", {"loss": losses}, 3, [50, 100][: len(losses)])
        with Image.open(tmp_path / "losses.png") as picture:
            pixels = np.asarray(picture.convert("RGB")).astype(int)
        legend = pixels.shape[0] // 8  # at the top, in the same red
        red = (np.abs(pixels[legend:] - (0xD1, 0x49, 0x5B)) < 9).all(-1)
        assert red.sum() > 20


def test_one_training_at_a_time_writes_into_a_folder(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    other = os.open(out, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    refused = train(out, "--steps", 1)
    assert refused.exit_code == 2
    assert "another training writes there" in " ".join(refused.output.split())
    assert not list(out.iterdir())
    os.close(other)
    assert train(out, "--steps", 1).exit_code == 0
    assert train(out, "--steps", 2, "--channels", 16, "--resume").exit_code == 2  # lets go of it
    assert train(out, "--steps", 2, "--resume").exit_code == 0
