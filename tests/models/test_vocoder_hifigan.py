"""HiFi-GAN beside transformers' and beside a plain chain of torch's functions; what it refuses."""

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from aigc_fast.models.vocoder import HiFiGANGenerator
from tests.models.checkpoints import assert_error_ratio
from tests.models.vocoders import SMALL, make

small = partial(make, "hifigan")


def plain(state, x, resblock, speaker=None):
    """The generator as a chain of torch's functions on its state dict."""

    def conv(name, y, padding=0, dilation=1):
        return F.conv1d(y, state[f"{name}.weight"], state.get(f"{name}.bias"), 1, padding, dilation)

    def leaky(y, slope=0.1):
        return torch.where(y > 0, y, y * slope)

    x = conv("conv_pre", x, 3)
    if speaker is not None:
        x = x + conv("cond", speaker)
    for i, rate in enumerate(SMALL["upsample_rates"]):
        weight, bias = state[f"ups.{i}.weight"], state[f"ups.{i}.bias"]
        x = F.conv_transpose1d(leaky(x), weight, bias, rate, (weight.shape[2] - rate) // 2)
        total = 0
        for j in (0, 1):
            y, name = x, f"resblocks.{2 * i + j}"
            kernel = SMALL["resblock_kernel_sizes"][j]
            for k, d in enumerate(SMALL["resblock_dilation_sizes"][j]):
                padding = d * (kernel - 1) // 2
                if resblock == "1":
                    z = conv(f"{name}.convs1.{k}", leaky(y), padding, d)
                    y = y + conv(f"{name}.convs2.{k}", leaky(z), kernel // 2)
                else:
                    y = y + conv(f"{name}.convs.{k}", leaky(y), padding, d)
            total = total + y
        x = total / 2
    return conv("conv_post", leaky(x, 0.01), 3).tanh()


@pytest.mark.parametrize("resblock", ["1", "2"])
@pytest.mark.parametrize("speaker_channels", [0, 5])
def test_against_a_plain_chain(resblock, speaker_channels):
    model = small(resblock=resblock, speaker_channels=speaker_channels, bias=not speaker_channels)
    x = torch.randn(2, 6, 9)
    speaker = torch.randn(2, 5, 1) if speaker_channels else None
    state = model.state_dict()
    wide = {name: value.double() for name, value in state.items()}
    exact = plain(wide, x.double(), resblock, None if speaker is None else speaker.double())
    with torch.no_grad():
        y = model(x, speaker)
    assert y.shape == (2, 1, 9 * model.hop) and model.hop == 8
    assert_error_ratio(y, plain(state, x, resblock, speaker), exact)
    with torch.no_grad():  # channels innermost
        assert_error_ratio(model(x.mT.contiguous().mT, speaker), y, exact)


def test_against_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.SpeechT5HifiGanConfig(model_in_dim=6, normalize_before=False, **SMALL)
    theirs = transformers.SpeechT5HifiGan(config).eval()
    model = small()
    names = {name.replace("upsampler.", "ups."): w for name, w in theirs.state_dict().items()}
    del names["mean"], names["scale"]
    model.load_state_dict(names)
    x = torch.randn(2, 6, 11)
    with torch.no_grad():
        ours, stock = model(x)[:, 0], theirs(x.transpose(1, 2))
        exact = theirs.double()(x.double().transpose(1, 2))
    assert_error_ratio(ours, stock, exact)


def test_a_checkpoint_must_fit_its_configuration(tmp_path):
    state = small().state_dict()
    path, config = tmp_path / "g.pt", tmp_path / "config.json"
    torch.save(state, path)

    def refused(**changes):
        config.write_text(json.dumps(SMALL | dict(num_mels=6) | changes))
        with pytest.raises(ValueError) as error:
            HiFiGANGenerator.from_pretrained(path)
        return str(error.value)

    assert "tensor 'conv_pre.weight' must have shape (16, 7, 7), got" in refused(num_mels=7)
    assert "tensor 'resblocks.0.convs.0.weight' is missing" in refused(resblock="2")
    assert "config.json: in_channels must be an integer in [1, 65536]" in refused(num_mels=2**40)
    assert "config.json: upsample_rates must be a sequence" in refused(upsample_rates=3)
    torch.save(state | {"x.weight": torch.ones(1)}, path)
    assert "no use is known for tensor 'x.weight'" in refused()
    config.write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json: must hold a JSON object"):
        HiFiGANGenerator.from_pretrained(path)
    config.write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json: .*upsample_rates"):
        HiFiGANGenerator.from_pretrained(path)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(resblock=1), 'resblock must be "1" or "2", got 1'),
        (dict(upsample_rates=(4, 2, 2)), "upsample_kernel_sizes must have for each"),
        (dict(upsample_kernel_sizes=(8, 5)), "plus 0 or an even number"),
        (dict(upsample_initial_channel=6), "upsample_initial_channel must be divisible by 2"),
        (dict(resblock_kernel_sizes=(3, 4)), "resblock_kernel_sizes must be odd"),
        (dict(resblock_dilation_sizes=((1,),)), "resblock_dilation_sizes must have one sequence"),
        (dict(resblock_dilation_sizes=((1,), ())), "resblock_dilation_sizes, each must be a seq"),
        (dict(in_channels=0), r"in_channels must be an integer in \[1,"),
        (dict(in_channels=True), r"in_channels must be an integer in \[1,"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_a_speaker_is_wanted_where_there_are_several():
    message = "speaker must be given if, and only if, there are speaker_channels"
    with pytest.raises(ValueError, match=message):
        small()(torch.zeros(1, 6, 2), torch.zeros(1, 5, 1))
    with pytest.raises(ValueError, match=message):
        small(speaker_channels=5)(torch.zeros(1, 6, 2))
