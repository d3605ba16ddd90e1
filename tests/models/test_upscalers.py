"""Real-ESRGAN's generators beside plain chains of torch's functions; published weights too."""

import re

import pytest
import torch
import torch.nn.functional as F

from aigc_fast.io import find_realesrgan
from aigc_fast.models.gan import RRDBNet, SRVGGNetCompact, load_generator
from tests.models.ncnn_files import Writer, rounded, write_compact, write_rrdb


def plain_compact(state, x, upscale, scale):
    """The compact generator as a chain of torch's functions on its state dict."""
    y = x
    for i in range(len([name for name in state if name.endswith("bias")])):
        y = F.conv2d(y, state[f"body.{2 * i}.weight"], state[f"body.{2 * i}.bias"], padding=1)
        if (slope := state.get(f"body.{2 * i + 1}.weight")) is not None:
            y = F.prelu(y, slope)
    y = F.pixel_shuffle(y, upscale) + x.repeat_interleave(upscale, 2).repeat_interleave(upscale, 3)
    if scale != upscale:
        size = [x.shape[2] * scale, x.shape[3] * scale]
        y = F.interpolate(y, size=size, mode="bicubic", align_corners=False)
    return y


def plain_rrdb(state, x):
    """The dense generator for 4 times the size, likewise."""

    def conv(name, y):
        return F.conv2d(y, state[f"{name}.weight"], state[f"{name}.bias"], padding=1)

    first = y = conv("conv_first", x)
    blocks = len({name.split(".")[1] for name in state if name.startswith("body.")})
    for b in range(blocks):
        block = y
        for r in (1, 2, 3):
            parts = [y]
            for c in (1, 2, 3, 4):
                name = f"body.{b}.rdb{r}.conv{c}"
                parts.append(F.leaky_relu(conv(name, torch.cat(parts, 1)), 0.2))
            y = conv(f"body.{b}.rdb{r}.conv5", torch.cat(parts, 1)) * 0.2 + y
        y = y * 0.2 + block
    y = first + conv("conv_body", y)
    for name in ("conv_up1", "conv_up2"):
        y = y.repeat_interleave(2, 2).repeat_interleave(2, 3)
        y = F.leaky_relu(conv(name, y), 0.2)
    return conv("conv_last", F.leaky_relu(conv("conv_hr", y), 0.2))


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("upscale, scale", [(2, 2), (4, 4), (4, 2)])
def test_compact_from_a_file(tmp_path, upscale, scale, half):
    torch.manual_seed(0)
    model = SRVGGNetCompact(num_feat=8, num_conv=2, upscale=upscale, scale=scale)
    for module in model.body[1::2]:
        torch.nn.init.normal_(module.weight)
    path = write_compact(tmp_path / "net", model, half=half)
    loaded = load_generator(path)
    assert type(loaded) is SRVGGNetCompact and not loaded.training and loaded.scale == scale
    state = rounded(model, half=half)
    assert loaded.state_dict().keys() == state.keys()
    assert all(value.equal(state[name]) for name, value in loaded.state_dict().items())
    x = torch.rand(2, 3, 5, 7)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), plain_compact(state, x, upscale, scale))


def test_rrdb_from_a_file(tmp_path):
    torch.manual_seed(0)
    model = RRDBNet(num_feat=8, num_block=2, num_grow_ch=4)
    loaded = load_generator(write_rrdb(tmp_path / "net", model))
    assert type(loaded) is RRDBNet
    state = rounded(model)
    assert loaded.state_dict().keys() == state.keys()
    assert all(value.equal(state[name]) for name, value in loaded.state_dict().items())
    x = torch.rand(2, 3, 5, 7)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), plain_rrdb(state, x))


@pytest.mark.parametrize("scale, size", [(1, (8, 4)), (2, (6, 4)), (4, (3, 5))])
def test_rrdb_scales(scale, size):
    model = RRDBNet(scale=scale, num_feat=4, num_block=1, num_grow_ch=2)
    assert model(torch.rand(1, 3, *size)).shape == (1, 3, size[0] * scale, size[1] * scale)
    with pytest.raises(ValueError, match="scale must be 1, 2 or 4, got 3"):
        RRDBNet(scale=3)


REACHING = [
    SRVGGNetCompact(num_feat=4, num_conv=3, upscale=2),
    SRVGGNetCompact(num_feat=4, num_conv=1, upscale=4, scale=3),
    RRDBNet(num_feat=4, num_block=1, num_grow_ch=2),
    RRDBNet(scale=2, num_feat=4, num_block=1, num_grow_ch=2),
]


@pytest.mark.parametrize("model", REACHING, ids=lambda m: type(m).__name__)
def test_nothing_beyond_its_reach_changes_a_result(model):
    width = 2 * model.reach + 8
    x = torch.rand(1, 3, 4, width).double().requires_grad_()
    y = model.double()(x)
    at = width // 2 - width // 2 % 2
    y[..., at * model.scale].sum().backward()
    touched = x.grad.abs().sum((0, 1, 2)).nonzero().flatten()
    assert at - model.reach <= touched.min() and touched.max() <= at + model.reach


MODELS = {
    "realesr-animevideov3-x2": (SRVGGNetCompact, 621_424, 2),
    "realesr-animevideov3-x3": (SRVGGNetCompact, 621_424, 3),
    "realesr-animevideov3-x4": (SRVGGNetCompact, 621_424, 4),
    "realesrgan-x4plus-anime": (RRDBNet, 4_467_779, 4),
    "realesrgan-x4plus": (RRDBNet, 16_697_987, 4),
}


@pytest.mark.parametrize("name", MODELS)
def test_published_weights(name):
    """As a plain chain of torch's functions has it on the same weights: PSNR above 50 dB."""
    kind, parameters, scale = MODELS[name]
    model = kind.from_pretrained(find_realesrgan(name))
    assert sum(p.numel() for p in model.parameters()) == parameters
    # A smooth picture with an edge.
    rows = torch.linspace(0, 1, 24)
    x = torch.stack([rows[:, None] * rows, (rows[:, None] > rows) * 0.8, rows.expand(24, 24)])[None]
    with torch.no_grad():
        y = model(x)
        state = model.state_dict()
        plain = (
            plain_compact(state, x, 4, scale) if kind is SRVGGNetCompact else plain_rrdb(state, x)
        )
    assert -10 * (y - plain).square().mean().log10() > 50
    # What it shows is the picture: the plain enlargement is near.
    near = F.interpolate(x, scale_factor=scale, mode="bilinear")
    assert -10 * (y - near).square().mean().log10() > 20


@pytest.mark.parametrize(
    "change, message",
    [
        ("0=4 1=3 4=1|0=4 1=3 4=0", "is Convolution of (0,) with"),
        ("0=4 1=3 4=1|0=4 1=3 3=2 4=1", "is Convolution of (0,) with"),
        ("0=2\nInterp|0=3\nInterp", "12 channels are no 3 of 3 * 3 pixels"),
    ],
)
def test_other_networks_are_refused(tmp_path, change, message):
    path = write_compact(tmp_path / "net", SRVGGNetCompact(num_feat=4, num_conv=1, upscale=2))
    text = path.with_suffix(".param").read_text()
    old, new = change.split("|")
    assert old in text
    path.with_suffix(".param").write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=re.escape(message)):
        load_generator(path)


def test_one_generator_is_not_the_other(tmp_path):
    path = write_compact(tmp_path / "net", SRVGGNetCompact(num_feat=4, num_conv=1, upscale=2))
    with pytest.raises(ValueError, match="not a RRDBNet: layer"):
        RRDBNet.from_pretrained(path)
    file = Writer()
    file.add("Input")
    file.save(tmp_path / "other")
    with pytest.raises(ValueError, match="less than two convolutions"):
        load_generator(tmp_path / "other")


def test_parameters_may_be_plain_tensors() -> None:
    """As torch.func and nn.DataParallel put them into a model."""
    model, x = SRVGGNetCompact(num_feat=16, num_conv=1), torch.rand(1, 3, 8, 8)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    torch.testing.assert_close(torch.func.functional_call(model, weights, x), model(x))
