"""Short videos of real handwritten digits that drift through a frame and bounce off its edges."""

from __future__ import annotations

import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from aigc_fast.ops._checks import check_positive

from ._memory import check_fits
from .digits import load_digits

#: the 28x28 pixels of a digit, of which it fills 20x20, as a share of the frame
_SHARE = 0.8
#: slowest and fastest, in shares of the frame from one image to the next
_SPEED = 0.04, 0.1
#: digits that are enlarged together: as floats they take more memory than as pixels
_AT_A_TIME = 250


def load_moving_digits(
    count: int = 10000,
    *,
    frames: int = 8,
    size: int = 32,
    digits: int = 1,
    seed: int = 0,
    path: str | os.PathLike[str] | None = None,
) -> tuple[Tensor, Tensor]:
    """Videos, uint8 (count, frames, size, size), and the labels of their digits, int64
    (count, digits).

    A digit is four sevenths of the frame high or wide. It starts anywhere, in any direction, and
    keeps its speed, which crosses the frame in ten to twenty-five images; where two digits meet,
    the brighter pixel shows. Every handwritten one is used as often as any other, and all is a
    function of the arguments.

    size:   pixels a side, at least 16.
    digits: of a video, 1 or 2.
    path:   that of `load_digits`, whose errors these are; besides, ValueError for a count, frames,
            size or digits out of range, and for videos that do not fit in the free memory.

    Source: Srivastava et al. 2015, arXiv:1502.04681, there two digits of 28x28 in 64x64.
    """
    check_positive(count=count, frames=frames)
    if size < 16:
        raise ValueError(f"size must be at least 16, got {size}")
    if digits not in (1, 2):
        raise ValueError(f"digits must be 1 or 2, got {digits}")
    check_fits(size, count, frames, size, size)
    images, labels = load_digits(path)
    with torch.device("cpu"):  # whatever the default is
        random = torch.Generator().manual_seed(seed)
        rounds = -(-count * digits // len(images))
        order = torch.cat([torch.randperm(len(images), generator=random) for _ in range(rounds)])
        chosen = order[: count * digits].view(count, digits)
        start = torch.rand(count, digits, 1, 2, generator=random)  # a share of the way there is
        angle, speed = torch.rand(2, count, digits, 1, 1, generator=random)
        speed = size * (_SPEED[0] + (_SPEED[1] - _SPEED[0]) * speed)
        way = speed * torch.cat([(2 * math.pi * angle).sin(), (2 * math.pi * angle).cos()], dim=-1)
        way = way * torch.arange(frames)[:, None]  # (count, digits, frames, 2)

        side = round(_SHARE * size)
        crops = [crop for part in images.split(_AT_A_TIME) for crop in _resized(part, side)]
        room = torch.tensor([[size - n for n in crop.shape] for crop in crops])[chosen][:, :, None]
        places = start * room + way
        places = room - (room - places.remainder(2 * room)).abs()  # there and back again
    videos = np.zeros((count, frames, size, size), np.uint8)
    for video, picks, tracks in zip(
        videos, chosen.tolist(), places.round().int().tolist(), strict=True
    ):
        for crop, track in zip((crops[i] for i in picks), tracks, strict=True):
            for frame, (y, x) in zip(video, track, strict=True):
                there = frame[y : y + crop.shape[0], x : x + crop.shape[1]]
                np.maximum(there, crop, out=there)
    return torch.from_numpy(videos), labels[chosen]


def _resized(images: Tensor, side: int) -> list[np.ndarray]:
    """Each enlarged to side x side pixels, then without its margin."""
    images = F.interpolate(images[:, None].float(), (side, side), mode="bilinear", antialias=True)
    return [_without_margin(image) for image in images[:, 0].round().byte().numpy()]


def _without_margin(image: np.ndarray) -> np.ndarray:
    rows, columns = np.nonzero(image)
    return image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].copy()
