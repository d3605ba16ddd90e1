"""`aigc-fast upscale`: a picture file, enlarged by a generator of Real-ESRGAN.

Memory: a picture is whole in memory, as Pillow has it, and the activations are those of one tile.
That is 12 bytes a pixel while it is read; then 8 bytes a pixel of the source and 4 of the result
(1 where it is grey), one more of each for alpha, and what encoding takes: nothing to speak of for
PNG and JPEG, about 8 bytes a pixel of the result for WebP.
"""

from __future__ import annotations

import io
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageChops, ImageOps
from rich.console import Console
from rich.progress import Progress

from aigc_fast._devices import default_device
from aigc_fast.io import find_realesrgan
from aigc_fast.io._whole import save_picture
from aigc_fast.models.gan import RRDBNet, SRVGGNetCompact, load_generator
from aigc_fast.models.gan.upscale import choose_dtype, count_tiles, upscale_tiles

#: pixels a side that a format can hold
LIMITS = {"JPEG": 65500, "WEBP": 16383, "ICO": 256}
OPAQUE = {"JPEG", "MPO", "BMP", "PPM", "PCX", "EPS"}


@dataclass
class Picture:
    """What a file holds: colours (RGB), alpha (L) or None, and what goes along with them."""

    colours: Image.Image
    alpha: Image.Image | None
    grey: bool
    along: dict[str, Any]
    frames: int  # in the file, of which this is the first


def run(
    console: Console,
    source: Path,
    output: Path,
    *,
    model: str,
    tile: int | None,
    overlap: int | None,
    dtype: str,
) -> None:
    start = time.perf_counter()
    generator = _load_model(model, dtype)
    picture = read_picture(source)
    if picture.frames > 1:
        console.print(
            f"{source}: the first of its {picture.frames} frames, the others are left out",
            style="yellow", markup=False, soft_wrap=True,
        )  # fmt: skip
    size = tuple(side * generator.scale for side in picture.colours.size)
    _check_output(output, size, picture)
    result = _enlarge(console, generator, picture, tile, overlap)
    write_picture(console, output, result, picture)
    console.print(
        f"{output}: {size[0]} x {size[1]} pixels in {time.perf_counter() - start:.1f} s",
        markup=False,
        soft_wrap=True,
    )


def _load_model(name: str, dtype: str) -> SRVGGNetCompact | RRDBNet:
    is_file = any(Path(f"{name}{suffix}").is_file() for suffix in ("", ".param"))
    model = load_generator(name if is_file else find_realesrgan(name))
    device = default_device()
    kept = choose_dtype(model, device) if dtype == "auto" else getattr(torch, dtype)
    return model.to(device, kept)


# ---- pictures ------------------------------------------------------------------------------------


def read_picture(path: Path) -> Picture:
    """The first frame, upright, of any mode that shows 8 bits a channel, or 16 of grey.

    Raises:
        OSError: the file cannot be opened or is no sound picture.
        ValueError: its mode is not supported.
    """
    try:
        with Image.open(path) as file:
            file.load()
            frames = getattr(file, "n_frames", 1)
            image = ImageOps.exif_transpose(file)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.filename is not None and error.errno is not None:
            raise  # no such file, not permitted, a folder
        raise OSError(f"{path}: not a sound picture: {error}") from None
    along: dict[str, Any] = {}
    if profile := image.info.get("icc_profile"):
        along["icc_profile"] = profile
    if exif := image.getexif():
        along["exif"] = exif
    alpha = None
    if image.mode.startswith("I"):  # 16 bits of grey
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        if (hidden := image.info.get("transparency")) is not None:
            alpha = Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8))
        image = Image.fromarray((values // 257).astype(np.uint8))
    if image.mode in ("F", "LAB", "HSV", "YCbCr"):
        raise ValueError(f"{path}: pictures of mode {image.mode} are not supported")
    if image.mode == "CMYK":
        along.pop("icc_profile", None)
    grey = image.mode in ("1", "L", "LA", "La")
    if "transparency" in image.info or image.mode in ("PA", "LA", "La", "RGBA", "RGBa"):
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    return Picture(image.convert("RGB"), alpha, grey, along, frames)


def _check_output(path: Path, size: tuple[int, ...], picture: Picture) -> None:
    """Refuses, before the work, what could not be written after it."""
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise ValueError(f"{path}: no picture can be written as {path.suffix or 'a file'!r}")
    mode = "L" if picture.grey else "RGB"
    if picture.alpha is not None and kind not in OPAQUE:
        mode = f"{mode}A"
    try:
        Image.new(mode, (1, 1)).save(io.BytesIO(), kind)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: this picture cannot be written as {kind}: {error}") from None
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}")
    if max(size) > (limit := LIMITS.get(kind, 2**31 - 1)):
        raise ValueError(
            f"{path}: the result has {size[0]} x {size[1]} pixels; {kind} holds {limit} a side"
        )


def write_picture(console: Console, path: Path, image: Image.Image, picture: Picture) -> None:
    """Writes the enlarged colours with what the picture has beside them."""
    if picture.alpha is not None:
        alpha = picture.alpha.resize(image.size, Image.Resampling.LANCZOS)
        if Image.registered_extensions()[path.suffix.lower()] in OPAQUE:
            console.print(f"{path.suffix} has no alpha: laid on white", style="yellow")
            image.paste("white", mask=ImageChops.invert(alpha))
        else:
            image.putalpha(alpha)
    save_picture(path, image, **picture.along)


def _enlarge(
    console: Console,
    model: SRVGGNetCompact | RRDBNet,
    picture: Picture,
    tile: int | None,
    overlap: int | None,
) -> Image.Image:
    width, height = picture.colours.size
    if tile is None:
        tile = 256 if isinstance(model, SRVGGNetCompact) else 128
    pixels = torch.from_numpy(np.array(picture.colours)).permute(2, 0, 1)
    mode = "L" if picture.grey else "RGB"
    result = Image.new(mode, (width * model.scale, height * model.scale))
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("upscaling", total=count_tiles(height, width, tile))
        for top, left, part in upscale_tiles(model, pixels, tile, overlap):
            colours = part.permute(1, 2, 0).contiguous().numpy()
            result.paste(Image.fromarray(colours), (left, top))
            progress.advance(task)
    return result
