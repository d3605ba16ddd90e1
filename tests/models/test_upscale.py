"""Tiles: nobody can see where they meet."""

import pytest
import torch

from aigc_fast.models.gan import RRDBNet, SRVGGNetCompact, upscale
from aigc_fast.models.gan.upscale import choose_dtype, count_tiles, upscale_tiles


def compact(**options):
    torch.manual_seed(0)
    return SRVGGNetCompact(num_feat=4, num_conv=2, **options).eval()


def image(height, width):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("size", [(33, 50), (1, 40), (7, 1)])
def test_tiles_are_the_whole(size, scale):
    # In float64, where no rounding of the sums decides a pixel.
    model, x = compact(upscale=4, scale=scale).double(), image(*size)
    whole = upscale(model, x, tile=64)
    assert whole.shape == (3, size[0] * scale, size[1] * scale)
    for tile in (3, 10):
        assert upscale(model, x, tile, overlap=model.reach).equal(whole)
    assert not upscale(model, image(33, 50), 10, overlap=0).equal(upscale(model, image(33, 50)))


def test_every_pixel_is_written_once():
    model, x = compact(upscale=2), image(9, 20)
    written = torch.zeros(18, 40, dtype=torch.int32)
    tiles = list(upscale_tiles(model, x, tile=7))
    for top, left, pixels in tiles:
        assert max(pixels.shape[1:]) <= 14
        written[top : top + pixels.shape[1], left : left + pixels.shape[2]] += 1
    assert (written == 1).all() and len(tiles) == count_tiles(9, 20, 7) == 6


@pytest.mark.parametrize("fast", [False, True])
def test_the_dtype_of_deep_networks_is_float32(monkeypatch, fast):
    monkeypatch.setattr("aigc_fast._devices._has", lambda feature: fast)
    best = torch.bfloat16 if fast else torch.float32
    rrdb = [RRDBNet(num_feat=4, num_block=n, num_grow_ch=2) for n in (6, 23)]  # the published ones
    assert [choose_dtype(m, "cpu") for m in (compact(), *rrdb)] == [best, best, torch.float32]


def test_the_published_depth_and_its_default_overlap():
    """RRDBNet reaches far, but what is beyond 32 pixels hardly counts."""
    torch.manual_seed(0)
    model = RRDBNet(num_feat=8, num_block=4, num_grow_ch=4).eval()
    assert model.reach > 32
    whole, tiled = (upscale(model, image(70, 12), tile) for tile in (70, 20))
    assert (whole.int() - tiled.int()).abs().max() <= 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((image(4, 4), 0), "tile must be at least 1, got 0"),
        ((image(4, 4), 8, -1), "overlap must not be negative, got -1"),
        ((image(4, 4).float(),), "image must be uint8"),
        ((image(4, 4)[0],), "image must be uint8"),
        ((image(0, 4),), "at least one pixel"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        list(upscale_tiles(compact(upscale=2), *arguments))


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("size", [(9, 14), (1, 1), (30, 7)])
def test_a_model_that_folds_pixels_takes_any_size(size, scale):
    torch.manual_seed(0)
    model = RRDBNet(scale=scale, num_feat=4, num_block=1, num_grow_ch=2).double()
    torch.nn.init.constant_(model.conv_last.bias, 0.5)  # the middle of the range
    x = image(*size)
    whole = upscale(model, x, tile=64)
    assert whole.shape == (3, size[0] * scale, size[1] * scale)
    down, right = (-side % model.fold for side in size)
    padded = torch.nn.functional.pad(x.double(), (0, right, 0, down), "replicate").byte()
    assert upscale(model, padded)[:, : whole.shape[1], : whole.shape[2]].equal(whole)
    for tile in (5, 8, 13):
        assert upscale(model, x, tile, overlap=model.reach).equal(whole)
