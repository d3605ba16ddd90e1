"""Files of pictures, films and sound on a full disk."""

from importlib.util import find_spec

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

from rich.console import Console

from aigc_fast.cli import pictures
from aigc_fast.cli.upscale import Picture, write_picture
from aigc_fast.io import write_wav
from tests.full_disk import full_disk


def write(path, name):
    frames = torch.rand(3, 9, 64, 64) * 2 - 1
    if name == "grid.png":
        pictures.save_grid(path, frames[0], 3)
    elif name.startswith("film"):
        pictures.save_film(path, frames, 3)
    elif name == "losses.png":
        pictures.save_losses(path, {"loss": [1.0, 2.0] * 50}, 5)
    elif name == "speech.wav":
        write_wav(path, [torch.rand(5000)], 8000)
    else:
        image = Image.effect_noise((256, 256), 50)
        write_picture(Console(), path, image, Picture(image, None, True, {}, 1))


@pytest.mark.parametrize(
    "name",
    [
        "grid.png",
        "film.gif",
        pytest.param("film.mp4", marks=pytest.mark.skipif(not find_spec("av"), reason="no av")),
        "losses.png", "speech.wav", "enlarged.jpg", "enlarged.webp",
    ],
)  # fmt: skip
def test_a_full_disk_is_named_and_leaves_the_old_file(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"old")
    with pytest.raises(OSError, match=f"File too large: '{path}'"), full_disk(1000):
        write(path, name)
    assert [*tmp_path.iterdir()] == [path] and path.read_bytes() == b"old"
    write(path, name)
    assert [*tmp_path.iterdir()] == [path] and path.stat().st_size > 1000
