"""`aigc-fast upscale` on files as they occur."""

import io
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("typer")
Image = pytest.importorskip("PIL.Image")

from aigc_fast.models.gan import SRVGGNetCompact
from tests.cli.test_cli import run
from tests.models.ncnn_files import write_compact


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """One that only enlarges: what it adds to the nearest pixel is nothing."""
    net = SRVGGNetCompact(num_feat=2, num_conv=1, upscale=2)
    for parameter in net.parameters():
        torch.nn.init.zeros_(parameter)
    return str(write_compact(tmp_path_factory.mktemp("model") / "nearest", net))


def picture(mode, size=(5, 3)):
    shape = (size[1], size[0], 4)
    values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    values[..., 3] = 255
    values[:, :2, 3] = 0
    return Image.fromarray(values, "RGBA").convert(mode)


def enlarge(model, image, tmp_path, suffix=".png", source=".png", **save):
    image.save(tmp_path / f"in{source}", **save)
    output = tmp_path / f"out{suffix}"
    result = run(
        "upscale", str(tmp_path / f"in{source}"), "--output", str(output), "--model", model
    )
    assert result.exit_code == 0, result.output
    return Image.open(output)


def nearest(image):
    return image.resize((image.width * 2, image.height * 2), Image.Resampling.NEAREST)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
@pytest.mark.parametrize("size", [(5, 3), (1, 1)])
def test_modes(model, tmp_path, mode, size):
    image = picture("RGB", size).convert(mode)
    result = enlarge(model, image, tmp_path)
    assert result.mode == ("L" if mode in "L1" else "RGB")
    assert np.array_equal(np.asarray(result), np.asarray(nearest(image.convert(result.mode))))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_alpha_is_kept(model, tmp_path, mode, suffix):
    image = picture(mode)
    options = {"lossless": True, "exact": True} if suffix == ".webp" else {}
    result = enlarge(model, image, tmp_path, suffix, suffix, **options)
    alpha = np.asarray(result.convert("RGBA"))[..., 3]
    assert alpha[:, :3].max() < 20 and alpha[:, -5:].min() > 235
    if suffix == ".png":
        assert result.mode == mode
        colours = nearest(image.convert("RGBA")).convert("RGB")
        assert np.array_equal(np.asarray(result.convert("RGBA"))[..., :3], np.asarray(colours))


def test_a_transparent_colour_of_a_palette_is_kept(model, tmp_path):
    image = picture("P")
    result = enlarge(model, image, tmp_path, transparency=image.getpixel((0, 0)))
    assert result.mode == "RGBA" and result.getchannel("A").getextrema()[0] == 0


@pytest.mark.parametrize("suffix", [".jpg", ".bmp", ".ppm", ".pcx"])
def test_formats_without_alpha(model, tmp_path, suffix):
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    result = enlarge(model, image, tmp_path, suffix)
    assert result.mode == "RGB" and np.asarray(result).min() > 250


def test_sixteen_bits_of_grey(model, tmp_path):
    image = Image.fromarray(np.array([[0, 257, 65535]], dtype=np.uint16))
    result = enlarge(model, image, tmp_path)
    assert np.asarray(result).tolist() == [[0, 0, 1, 1, 255, 255]] * 2


def test_a_transparent_shade_of_sixteen_bits_is_kept(model, tmp_path):
    image = Image.fromarray(np.array([[0, 0, 0, 65535]], dtype=np.uint16))
    result = enlarge(model, image, tmp_path, transparency=0)
    alpha = np.asarray(result.getchannel("A"))
    assert result.mode == "LA" and alpha[0, 0] < 20 and alpha[0, -1] > 235


def test_a_turned_photograph_comes_out_upright_with_its_profile(model, tmp_path):
    image = Image.new("RGB", (8, 4), "red")
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"  # turned by a quarter
    result = enlarge(model, image, tmp_path, ".jpg", ".jpg", exif=exif, icc_profile=b"profile")
    assert result.size == (8, 16)
    assert result.getexif().get(0x0112, 1) == 1 and result.getexif()[0x010F] == "maker"
    assert result.info["icc_profile"] == b"profile"


def test_cmyk(model, tmp_path):
    result = enlarge(model, Image.new("CMYK", (4, 4), (0, 255, 255, 0)), tmp_path, source=".jpg")
    red, green, blue = result.getpixel((3, 3))
    assert red > 240 and green < 15 and blue < 15


PEAKS = """
import resource, sys
from pathlib import Path
from rich.console import Console
from aigc_fast.cli.upscale import run

for name in sys.argv[2:]:
    options = {"model": sys.argv[1], "tile": None, "overlap": None, "dtype": "float32"}
    run(Console(quiet=True), Path(name), Path(name + ".png"), **options)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def test_memory_grows_as_documented(model, tmp_path):
    """8 MB for a million pixels of the source and 4 of the result, one more of each for alpha."""
    pictures = {"small": ("RGB", (512, 512)), "large": ("RGB", (2000, 1000)),
                "alpha": ("RGBA", (2000, 1000))}  # fmt: skip
    for name, (mode, size) in pictures.items():
        Image.new(mode, size, (30, 90, 160, 200)[: len(mode)]).save(tmp_path / name, "PNG")
    command = [sys.executable, "-c", PEAKS, model, *(str(tmp_path / name) for name in pictures)]
    small, large, alpha = map(float, subprocess.check_output(command, text=True).split())
    assert large - small < 8 * 2 + 4 * 8
    assert alpha - small < 9 * 2 + 5 * 8
    assert Image.open(tmp_path / "alpha.png").size == (4000, 2000)


@pytest.mark.parametrize("kind", ["gif", "webp", "tiff"])
def test_frames_that_are_left_out_are_spoken_of(model, tmp_path, kind):
    first, *others = (picture("RGB").point(lambda v, n=n: v // n) for n in (1, 2, 3))
    said = {}
    for name, more in {"one": [], "three": others}.items():
        source = tmp_path / f"{name}.{kind}"
        first.save(source, save_all=True, append_images=more)
        output = tmp_path / f"{name}.png"
        result = run("upscale", str(source), "--output", str(output), "--model", model)
        assert result.exit_code == 0, result.output
        said[name] = result.output
    assert "the first of its 3 frames" in said["three"] and "the first of" not in said["one"]
    assert Image.open(tmp_path / "three.png").size == (10, 6)


def refused(*arguments):
    result = run("upscale", *map(str, arguments))
    assert result.exit_code == 2
    return " ".join(result.output.replace("│", " ").split())  # without the box around it


def test_damaged_pictures_give_one_line(model, tmp_path):
    data = {}
    for kind in ("PNG", "JPEG", "WEBP"):
        buffer = io.BytesIO()
        picture("RGB", (40, 30)).save(buffer, kind)
        data[kind] = buffer.getvalue()
    path, rng = tmp_path / "picture", random.Random(0)
    out = ("--output", tmp_path / "out.png", "--model", model)
    for content in data.values():
        for end in (0, 3, 30, len(content) // 2):
            path.write_bytes(content[:end])
            assert "not a sound picture" in refused(path, *out)
        for _ in range(8):
            damaged = bytearray(content)
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            result = run("upscale", str(path), *map(str, out))
            assert result.exit_code in (0, 2)
            assert result.exit_code == 0 or "not a sound picture" in result.output


def test_what_cannot_be_written_is_refused_before_the_work(model, tmp_path):
    path = tmp_path / "in.png"
    picture("RGB").save(path)
    common = ("--model", model)
    assert "written as '.txt'" in refused(path, "--output", tmp_path / "out.txt", *common)
    assert "no folder" in refused(path, "--output", tmp_path / "no" / "out.png", *common)
    assert "cannot be written as XBM" in refused(path, "--output", tmp_path / "out.xbm", *common)
    Image.new("L", (200, 1)).save(path)
    message = refused(path, "--output", tmp_path / "out.ico", *common)
    assert "400 x 2 pixels; ICO holds 256 a side" in message
    Image.new("L", (9000, 1)).save(path)
    message = refused(path, "--output", tmp_path / "out.webp", *common)
    assert "18000 x 2 pixels; WEBP holds 16383 a side" in message


def test_unknown_models_and_missing_pictures(tmp_path):
    path = tmp_path / "in.png"
    out = ("--output", tmp_path / "out.png")
    assert "does not exist" in refused(path, *out)
    picture("RGB").save(path)
    assert "no model 'x9'; there are realesr-animevideov3-x2," in refused(
        path, *out, "--model", "x9"
    )
    (tmp_path / "bad.param").write_text("GGUF")
    (tmp_path / "bad.bin").touch()
    assert "must be 7767517" in refused(path, *out, "--model", tmp_path / "bad")
    assert "in.png: not a network of ncnn, which" in refused(path, *out, "--model", path)


def test_a_published_model_and_its_options(tmp_path):
    path = tmp_path / "in.png"
    picture("RGB", (24, 16)).save(path)
    options = ("--tile", "16", "--overlap", "4", "--dtype", "float32")
    name = "realesr-animevideov3-x3"
    result = run(
        "upscale", str(path), "--output", str(tmp_path / "o.png"), "--model", name, *options
    )
    assert result.exit_code == 0 and "72 x 48 pixels in" in result.output
    assert Image.open(tmp_path / "o.png").size == (72, 48)
