"""A folder of images as one tensor."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ._memory import check_fits

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def _of_8_bits(image: Image.Image) -> Image.Image:
    """The same, or what has 16 bits of grey in 8, where Pillow would cut all above 255."""
    from PIL import Image

    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64).clip(0, 65535)
    return Image.fromarray((values // 257).astype(np.uint8))


def load_images(folder: str | os.PathLike[str], size: int) -> tuple[Tensor, Tensor]:
    """Images, uint8 (count, 3, size, size), and their classes, int64 (count,).

    Each image is turned upright, cut to its central square, then resized; alpha is dropped. Those
    of one folder or sub-folder are of one class; classes are numbered in the order of their paths.
    Hidden files are left out.

    Raises:
        OSError: the folder cannot be read.
        ValueError: it holds no images, one that is damaged, or more than fit in the free memory;
            size is below 1.
    """
    from PIL import Image, ImageOps

    if size < 1:
        raise ValueError(f"size must be positive, got {size}")
    files = sorted(
        p
        for p in Path(folder).rglob("*")
        if p.suffix.lower() in SUFFIXES
        and not p.is_dir()
        and not any(part.startswith(".") for part in p.relative_to(folder).parts)
    )
    if not files:
        raise ValueError(f"{folder}: holds no images ({', '.join(SUFFIXES)})")
    classes = sorted({file.parent for file in files})
    check_fits(size, len(files), 3, size, size)
    pictures = np.empty((len(files), 3, size, size), np.uint8)
    for picture, file in zip(pictures, files, strict=True):
        try:
            with Image.open(file) as image:
                upright = _of_8_bits(ImageOps.exif_transpose(image)).convert("RGB")
                square = ImageOps.fit(upright, (size, size), Image.Resampling.LANCZOS)
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{file}: not an image: {error}") from error
        picture[:] = np.asarray(square).transpose(2, 0, 1)
    labels = torch.tensor([classes.index(file.parent) for file in files])
    return torch.from_numpy(pictures), labels
