"""Short videos of real handwritten digits that drift through a frame and bounce off its edges."""

from __future__ import annotations

import math
import os

import numpy as np
import torch
from torch import Tensor

from .digits import load_digits

_SPEED = 1.0, 3.0  # slowest and fastest, in pixels a frame


def load_moving_digits(
    count: int = 5000,
    *,
    frames: int = 8,
    size: int = 32,
    digits: int = 1,
    seed: int = 0,
    path: str | os.PathLike[str] | None = None,
) -> tuple[Tensor, Tensor]:
    """Videos, uint8 (count, frames, size, size), and the labels of their digits, int64
    (count, digits).

    A digit keeps its pixels, without the margin around them. It starts anywhere, in any direction,
    at one to three pixels a frame; where two meet, the brighter pixel shows. Every image is used
    as often as any other, and all is a function of the arguments.

    size:   pixels a side, 24 at least: a digit is 20 high or wide.
    digits: of a video, 1 or 2.
    path:   that of `load_digits`, which tells the errors; besides, ValueError for a count, frames,
            size or digits out of range.

    Source: Srivastava et al. 2015, arXiv:1502.04681, there with two digits in 64x64.
    """
    for name, value, lowest in (("count", count, 1), ("frames", frames, 1), ("size", size, 24)):
        if value < lowest:
            raise ValueError(f"{name} must be at least {lowest}, got {value}")
    if digits not in (1, 2):
        raise ValueError(f"digits must be 1 or 2, got {digits}")
    images, labels = load_digits(path)
    random = torch.Generator().manual_seed(seed)
    rounds = -(-count * digits // len(images))
    order = torch.cat([torch.randperm(len(images), generator=random) for _ in range(rounds)])
    chosen = order[: count * digits].view(count, digits)
    start = torch.rand(count, digits, 1, 2, generator=random)  # a share of the way there is
    angle, speed = torch.rand(2, count, digits, 1, 1, generator=random)
    speed = _SPEED[0] + (_SPEED[1] - _SPEED[0]) * speed
    way = speed * torch.cat([(2 * math.pi * angle).sin(), (2 * math.pi * angle).cos()], dim=-1)
    way = way * torch.arange(frames)[:, None]  # (count, digits, frames, 2)

    crops = [_without_margin(image) for image in images.numpy()]
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


def _without_margin(image: np.ndarray) -> np.ndarray:
    rows, columns = np.nonzero(image)
    return image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
