"""`aigc-fast train gan` and `aigc-fast sample gan`, as a user runs them."""

import csv
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("mlxtend")

from PIL import Image
from typer.testing import CliRunner

from aigc_fast.cli import training_session
from aigc_fast.cli.app import app


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "100"})


def train(output, *more):
    small = ("--channels", 2, "--batch", 8, "--every", 2, "--output", output)
    return run("train", "gan", *small, *more)


def rows(output):
    with (output / "log.csv").open() as file:
        return [(row["step"], row["g_loss"], row["d_loss"]) for row in csv.DictReader(file)]


@pytest.fixture(autouse=True)
def few_digits(monkeypatch):
    images, labels = training_session.load_digits()
    monkeypatch.setattr(training_session, "load_digits", lambda: (images[::100], labels[::100]))


def test_train_resume_and_sample(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(whole, "--steps", 4, "--conditional").exit_code == 0
    assert train(parts, "--steps", 2, "--conditional").exit_code == 0
    again = train(parts, "--steps", 4, "--conditional")
    assert again.exit_code == 2 and "--resume goes on from it" in again.output.replace("\n", "")
    resumed = train(parts, "--steps", 4, "--conditional", "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "4 steps of 8 images" in resumed.output
    for file in ("checkpoint.pt", "log.csv", "samples.png", "losses.png"):
        assert (parts / file).exists()
    states = [torch.load(p / "checkpoint.pt", weights_only=True) for p in (whole, parts)]
    torch.testing.assert_close(*(s["trainer"]["generator"] for s in states), rtol=0, atol=0)

    picture = tmp_path / "seven.png"
    options = ("--checkpoint", parts / "checkpoint.pt", "--output", picture)
    result = run("sample", "gan", *options, "--count", 4, "--label", 7)
    assert result.exit_code == 0, result.output
    assert Image.open(picture).size == (4 * 32 * 3, 32 * 3)
    beyond = run("sample", "gan", *options, "--label", 10)
    assert beyond.exit_code == 2 and "label must be a class of the model" in beyond.output


def test_a_penalty_of_ones_own(tmp_path):
    options = ("--loss", "hinge", "--penalty", "r1+r2", "--penalty-weight", 2, "--steps", 3)
    result = train(tmp_path / "lazy", *options, "--penalty-interval", 2)
    assert result.exit_code == 0, result.output
    state = torch.load(tmp_path / "lazy" / "checkpoint.pt", weights_only=True)
    recipe = state["trainer"]["recipe"]
    assert [recipe["penalty" + key] for key in ("", "_weight", "_interval")] == ["r1+r2", 2.0, 2]
    assert recipe["loss"] == "hinge" and state["networks"]["norm"] is None
    result = train(tmp_path / "none", "--penalty", "none", "--steps", 1)  # of wgan-gp
    assert result.exit_code == 0, result.output
    state = torch.load(tmp_path / "none" / "checkpoint.pt", weights_only=True)
    assert state["trainer"]["recipe"]["penalty"] is None and state["networks"]["norm"] == "batch"


def test_stops_after_some_minutes(tmp_path):
    result = train(tmp_path / "out", "--minutes", 0.0001, "--arch", "mlp", "--loss", "hinge")
    assert result.exit_code == 0, result.output
    assert len(rows(tmp_path / "out")) == 1
    assert "Epoch [1], Step [1/" in result.output  # of how many nobody knows


def test_trains_on_a_folder_of_images(tmp_path):
    for i in range(8):
        (tmp_path / "images" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        color = (30 * i, 200 - 20 * i, 90)
        Image.new("RGB", (40, 30), color).save(tmp_path / "images" / str(i % 2) / f"{i}.png")
    options = ("--data", tmp_path / "images", "--size", 32, "--conditional")
    r3gan = ("--arch", "r3gan", "--loss", "r3gan", "--steps", 1)
    result = train(tmp_path / "out", *options, *r3gan)
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "out" / "samples.png").mode == "RGB"
    picture = tmp_path / "one.png"
    one = ("--checkpoint", tmp_path / "out" / "checkpoint.pt", "--label", 1, "--count", 1)
    assert run("sample", "gan", *one, "--output", picture).exit_code == 0
    assert Image.open(picture).size == (36 * 3, 36 * 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--loss", "bce"), "loss must be one of non-saturating"),
        (("--arch", "biggan"), "arch must be one of mlp, dcgan"),
        (("--penalty", "r3"), "penalty must be one of gradient, r1, r2, r1+r2, none, got 'r3'"),
        (("--loss", "hinge", "--penalty-weight", 2), "penalty must be given with its weight"),
        (("--size", 64), "size must be 28 for the digits"),
        (("--data", "nowhere"), "data must be digits, moving-digits or a folder"),
        (("--data", "moving-digits", "--size", 32), "data must be images for a GAN"),
        (("--batch", 51), "batch must be at most 50"),
        (("--arch", "mlp", "--conditional"), "the architecture mlp takes no labels"),
        (("--resume",), "checkpoint.pt"),
    ],
)
def test_refuses(options, words, tmp_path):
    result = train(tmp_path / "out", *options)
    assert result.exit_code == 2
    assert words in result.output.replace("\n", " ")


def test_sample_refuses_what_is_no_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save({"networks": {"arch": "dcgan"}}, path)
    for content in (path.read_bytes(), b"text"):
        path.write_bytes(content)
        result = run("sample", "gan", "--checkpoint", path, "--output", tmp_path / "out.png")
        assert result.exit_code == 2 and "not a checkpoint" in result.output.replace("\n", " ")


def test_logs_to_tensorboard(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, step))

        def add_image(self, name, pixels, step, dataformats):
            written.append((name, step, pixels.ndim, dataformats))

        def flush(self):
            pass

        def close(self):
            written.append("closed")

    output = tmp_path / "out"
    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer)
    )
    result = train(output, "--steps", 2, "--tensorboard")
    assert result.exit_code == 0, result.output
    numbers = [(name, 2) for name in ("g_loss", "d_loss", "skipped", "seconds")]
    picture = ("samples", 2, 2, "HW")
    assert written == [(str(output / "tensorboard"), 1), *numbers, picture, "closed"]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    result = train(output, "--steps", 4, "--tensorboard", "--resume")
    assert result.exit_code == 2 and "pip install tensorboard" in result.output
