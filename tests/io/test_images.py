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
    save(tmp_path / ".trash" / "1.png", (9,))
    images, labels = load_images(tmp_path, 4)
    assert images.shape == (3, 3, 4, 4) and labels.tolist() == [0, 1, 1]
    assert images[:, :, 0, 0].tolist() == [[255, 0, 0], [7, 7, 7], [1, 2, 3]]


def test_sixteen_bits_of_grey_keep_their_shades(tmp_path):
    rising = np.tile(np.arange(4, dtype=np.uint16) * 21845, (4, 1))
    Image.fromarray(rising).save(tmp_path / "a.png")
    images, _ = load_images(tmp_path, 4)
    assert images[0, 0, 0].tolist() == [0, 85, 170, 255]


def test_a_turned_photograph_is_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    rising = np.tile(np.arange(4, dtype=np.uint8) * 60, (4, 1))
    Image.fromarray(rising).save(tmp_path / "a.png", exif=exif)
    images, _ = load_images(tmp_path, 4)
    assert images[0, 0, :, 0].tolist() == [0, 60, 120, 180]


def test_what_is_no_picture_of_the_folder_is_left_out(tmp_path):
    save(tmp_path / "1.png", (7,))
    (tmp_path / "._1.png").write_bytes(b"what a file system keeps beside a file")
    (tmp_path / "folder.png").mkdir()
    images, _ = load_images(tmp_path, 4)
    assert len(images) == 1
    with pytest.raises(ValueError, match="size must be positive, got 0"):
        load_images(tmp_path, 0)
    with pytest.raises(ValueError, match="size must be less: 1 samples of 10000000 x 10000000"):
        load_images(tmp_path, 10**7)


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="holds no images"):
        load_images(tmp_path, 4)
    (tmp_path / "x.png").write_bytes(b"\x89PNG no more")
    with pytest.raises(ValueError, match="x.png: not an image"):
        load_images(tmp_path, 4)
