"""Commands that cannot do what they were asked for: one line that says why, exit code 2."""

import json
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("safetensors")

import typer
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from aigc_fast.cli.app import app
from aigc_fast.cli.errors import Commands

MODEL = Path(__file__).parents[2] / "docs/diffusion/digits_v.safetensors"


def refused(*arguments) -> str:
    """The only line that the command prints."""
    result = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "500"})
    assert isinstance(result.exception, SystemExit) and result.exit_code == 2, result.output
    [line] = result.output.splitlines()
    return line


def weights(path: Path, header: str | None) -> None:
    save_file({"x": torch.ones(2)}, path, None if header is None else {"aigc_fast": header})


def changed(path: Path, **changes) -> None:
    """The model of the docs with other entries in its header; None leaves one out."""
    with safe_open(MODEL, "pt") as file:
        config = json.loads(file.metadata()["aigc_fast"])["diffusion"] | changes
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    config = {name: value for name, value in config.items() if value is not None}
    save_file(tensors, path, {"aigc_fast": json.dumps({"diffusion": config})})


WRONG = {
    "empty": lambda path: path.touch(),
    "text": lambda path: path.write_text("no model\n" * 9),
    "noise": lambda path: path.write_bytes(os.urandom(999)),
    "cut": lambda path: path.write_bytes(MODEL.read_bytes()[:5000]),
    "a list": lambda path: torch.save([1], path),
    "another checkpoint": lambda path: torch.save({"networks": None, "trainer": {}}, path),
    "other weights": lambda path: weights(path, None),
    "a broken header": lambda path: weights(path, "{"),
    "a header of a list": lambda path: weights(path, "[]"),
    "a header of nothing": lambda path: weights(path, '{"diffusion": {}, "vae": {}}'),
    "a header of numbers": lambda path: weights(path, '{"diffusion": 5, "vae": 5}'),
    "other networks": lambda path: changed(path, channels=[8, 8, 8]),
    "no prediction": lambda path: changed(path, prediction=None),
    "another prediction": lambda path: changed(path, prediction="sharpness"),
    "no size": lambda path: changed(path, size=None),
}


@pytest.mark.parametrize("kind", ["gan", "diffusion", "vae"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_checkpoint_of_another_kind_is_named(kind, wrong, tmp_path):
    path = tmp_path / "some[/]where" / "file.bin"
    path.parent.mkdir(parents=True)
    WRONG[wrong](path)
    output = tmp_path / "samples.png"
    line = refused("sample", kind, "--checkpoint", path, "--output", output)
    assert line.startswith(f"{path}: not ") and len(line) < 500 + len(str(path))
    assert not output.exists()


def test_what_a_header_lacks_is_said(tmp_path):
    path, output = tmp_path / "model.safetensors", tmp_path / "samples.png"
    weights(path, None)
    line = refused("sample", "diffusion", "--checkpoint", path, "--output", output)
    assert line == f"{path}: not the model.safetensors of a diffusion model: it has no 'aigc_fast'"


@pytest.mark.parametrize("kind", ["gan", "diffusion", "vae"])
@pytest.mark.parametrize(
    "state", [{"networks": {}}, {"networks": {"arch": "dcgan"}, "trainer": {}}, [1]]
)
def test_a_training_resumes_no_other(kind, state, tmp_path):
    torch.save(state, tmp_path / "checkpoint.pt")
    line = refused("train", kind, "--channels", 8, "--output", tmp_path, "--resume")
    assert str(tmp_path / "checkpoint.pt") in line


def test_a_checkpoint_without_its_parts_is_none_of_this_training(tmp_path):
    options = ("train", "vae", "--channels", 8, "--batch", 2, "--steps", 1, "--output", tmp_path)
    assert CliRunner().invoke(app, list(map(str, options))).exit_code == 0
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    del state["trainer"]["average"]
    torch.save(state, tmp_path / "checkpoint.pt")
    line = refused(*options[:-4], "--steps", 2, "--output", tmp_path, "--resume")
    assert "checkpoint.pt: not a checkpoint of this training: " in line and "average" in line


@pytest.mark.parametrize("kind", ["gan", "diffusion", "vae"])
def test_a_folder_that_cannot_be_made(kind, tmp_path):
    (tmp_path / "file").touch()
    line = refused("train", kind, "--channels", 8, "--output", tmp_path / "file" / "run")
    assert "Not a directory" in line


def test_guidance_must_be_a_number(tmp_path):
    output = tmp_path / "samples.png"
    options = ("--checkpoint", MODEL, "--output", output, "--guidance", "nan")
    assert refused("sample", "diffusion", *options) == "guidance must be finite, got nan"
    assert not output.exists()


@pytest.mark.parametrize("command", [("sample", "vae"), ("train", "gan"), ("generate",)])
def test_seeds_are_those_of_torch(command):
    result = CliRunner().invoke(app, [*command, "--seed", str(2**63)])
    assert result.exit_code == 2 and "--seed" in result.output


def test_endless_minutes_are_refused(tmp_path):
    line = refused("train", "gan", "--minutes", "inf", "--channels", 8, "--output", tmp_path)
    assert line == "minutes must be finite, got inf"


def test_every_error_is_one_line_and_a_mistake_keeps_its_traceback():
    commands = typer.Typer(cls=Commands)
    errors = {
        "package": ModuleNotFoundError("No module named 'PIL'", name="PIL"),
        "lines": ValueError("first\n  [bold]second[/]\n" + "word " * 999),
        "silent": OSError(),
        "mistake": IndexError("out of range"),
    }

    @commands.command()
    def fail(how: str) -> None:
        raise errors[how]

    @commands.command()
    def other() -> None: ...

    results = {how: CliRunner().invoke(commands, ["fail", how]) for how in errors}
    assert results["package"].output.strip() == "this needs a package that is not installed: pillow"
    assert results["lines"].output.startswith("first [bold]second[/] word word")
    assert len(results["lines"].output) < 500 and results["lines"].output.count("\n") == 1
    assert results["silent"].output.strip() == "OSError"
    assert isinstance(results.pop("mistake").exception, IndexError)
    assert {result.exit_code for result in results.values()} == {2}
