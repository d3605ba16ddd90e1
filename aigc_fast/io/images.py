"""A folder of images as one tensor."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def load_images(folder: str | os.PathLike[str], size: int) -> tuple[Tensor, Tensor]:
    """Images, uint8 (count, 3, size, size), and their classes, int64 (count,).

    Each image is cut to its central square, then resized. Those of one folder or sub-folder are of
    one class; classes are numbered in the order of their paths.

    Raises:
        OSError: the folder cannot be read.
        ValueError: it holds no images, or one that is damaged.
    """
    from PIL import Image, ImageOps

    files = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"{folder}: holds no images ({', '.join(SUFFIXES)})")
    classes = sorted({file.parent for file in files})
    pictures = np.empty((len(files), size, size, 3), np.uint8)
    for picture, file in zip(pictures, files, strict=True):
        try:
            with Image.open(file) as image:
                square = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{file}: not an image: {error}") from error
        picture[:] = np.asarray(square)
    labels = torch.tensor([classes.index(file.parent) for file in files])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(), labels
