"""Folders of images."""

import numpy as np
import pytest

pytest.importorskip("PIL")

from PIL import Image

from aigc_fast.io import load_images


def save(path, color, size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(
        np.full((size[1], size[0], len(color)), color, np.uint8).squeeze(
            -1 if len(color) == 1 else ()
        )
    ).save(path)


def test_images_are_squares_of_their_classes(tmp_path):
    save(tmp_path / "a" / "1.png", (255, 0, 0))
    save(tmp_path / "b" / "1.png", (7,))
    save(tmp_path / "b" / "2.PNG", (1, 2, 3), size=(1, 1))
    (tmp_path / "notes.txt").write_text("no image")
    images, labels = load_images(tmp_path, 4)
    assert images.shape == (3, 3, 4, 4) and labels.tolist() == [0, 1, 1]
    assert images[:, :, 0, 0].tolist() == [[255, 0, 0], [7, 7, 7], [1, 2, 3]]


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="holds no images"):
        load_images(tmp_path, 4)
    (tmp_path / "x.png").write_bytes(b"\x89PNG no more")
    with pytest.raises(ValueError, match="x.png: not an image"):
        load_images(tmp_path, 4)
