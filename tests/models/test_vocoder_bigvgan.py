"""BigVGAN beside a plain chain of torch's functions; what it refuses."""

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from aigc_fast.models.vocoder import BigVGANGenerator
from tests.models.checkpoints import assert_error_ratio
from tests.models.vocoders import GENERATORS, SMALL, make

small = partial(make, "bigvgan")


def plain(state, x, options):
    """The generator as a chain of torch's functions on its state dict."""

    def conv(name, y, padding, dilation=1):
        return F.conv1d(y, state[f"{name}.weight"], state.get(f"{name}.bias"), 1, padding, dilation)

    def snake(name, y):
        alpha = state[f"{name}.alpha"][:, None]
        beta = state.get(f"{name}.beta", state[f"{name}.alpha"])[:, None]
        if options["snake_logscale"]:
            alpha, beta = alpha.exp(), beta.exp()
        return y + (y * alpha).sin().square() / (beta + 1e-9)

    def activation(name, y):
        c = y.shape[1]
        up = state[f"{name}.upsample.filter"].expand(c, 1, 12)
        down = state[f"{name}.downsample.lowpass.filter"].expand(c, 1, 12)
        y = F.conv_transpose1d(F.pad(y, (5, 5), mode="replicate"), up, stride=2, groups=c)
        y = snake(f"{name}.act", 2 * y[..., 15:-15])
        return F.conv1d(F.pad(y, (5, 6), mode="replicate"), down, stride=2, groups=c)

    x = conv("conv_pre", x, 3)
    for i, rate in enumerate(SMALL["upsample_rates"]):
        weight, bias = state[f"ups.{i}.0.weight"], state[f"ups.{i}.0.bias"]
        x = F.conv_transpose1d(x, weight, bias, rate, (weight.shape[2] - rate) // 2)
        total = 0
        for j in (0, 1):
            y, name = x, f"resblocks.{2 * i + j}"
            kernel = SMALL["resblock_kernel_sizes"][j]
            for k, d in enumerate(SMALL["resblock_dilation_sizes"][j]):
                padding = d * (kernel - 1) // 2
                if options["resblock"] == "1":
                    z = activation(f"{name}.activations.{2 * k}", y)
                    z = conv(f"{name}.convs1.{k}", z, padding, d)
                    z = activation(f"{name}.activations.{2 * k + 1}", z)
                    y = y + conv(f"{name}.convs2.{k}", z, kernel // 2)
                else:
                    z = activation(f"{name}.activations.{k}", y)
                    y = y + conv(f"{name}.convs.{k}", z, padding, d)
            total = total + y
        x = total / 2
    x = conv("conv_post", activation("activation_post", x), 3)
    return x.tanh() if options["use_tanh_at_final"] else x.clamp(-1, 1)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("activation", ["snake", "snakebeta"])
@pytest.mark.parametrize(
    "options",
    [
        dict(resblock="1", snake_logscale=True, use_bias_at_final=True, use_tanh_at_final=True),
        dict(resblock="2", snake_logscale=False, use_bias_at_final=False, use_tanh_at_final=False),
    ],
)
def test_against_a_plain_chain(options, activation, grad):
    model = small(activation=activation, **options)
    x = torch.randn(2, 6, 9)
    state = {name: value.detach() for name, value in model.state_dict().items()}
    assert ("conv_post.bias" in state) == options["use_bias_at_final"]
    exact = plain({name: value.double() for name, value in state.items()}, x.double(), options)
    with torch.set_grad_enabled(grad):
        y = model(x)
    assert y.requires_grad == grad and y.shape == (2, 1, 9 * model.hop) and model.hop == 8
    assert_error_ratio(y.detach(), plain(state, x, options), exact)


def test_samples_are_clamped():
    model = small(use_tanh_at_final=False)
    weight = torch.randn_like(model.conv_post.weight)
    model.conv_post.weight.data = 1e3 * (weight - weight.mean(2, keepdim=True))
    with torch.no_grad():
        y = model(torch.randn(1, 6, 30))
    assert y.max() == 1 and y.min() == -1


def test_names_are_the_published_ones():
    names = set(small().state_dict())
    assert {"conv_pre.weight", "ups.1.0.weight", "ups.1.0.bias", "conv_post.bias"} <= names
    assert {"resblocks.3.convs1.2.weight", "resblocks.3.convs2.2.bias"} <= names
    for stem in ("activation_post", "resblocks.3.activations.5"):
        kinds = ("act.alpha", "act.beta", "upsample.filter", "downsample.lowpass.filter")
        assert {f"{stem}.{kind}" for kind in kinds} <= names
    assert "resblocks.3.activations.6.act.alpha" not in names


def test_a_checkpoint_must_fit_its_configuration(tmp_path):
    state = small().state_dict()
    path, config = tmp_path / "g.pt", tmp_path / "config.json"

    def refused(tensors=state, without=(), **changes):
        torch.save({"generator": tensors}, path)
        options = GENERATORS["bigvgan"][1] | dict(num_mels=6) | changes
        config.write_text(json.dumps({k: v for k, v in options.items() if k not in without}))
        with pytest.raises(ValueError) as error:
            BigVGANGenerator.from_pretrained(path)
        return str(error.value)

    name = "activation_post.act.beta"
    assert f"no use is known for tensor '{name}'" in refused(activation="snake")
    assert "tensor 'resblocks.0.convs.0.weight' is missing" in refused(resblock="2")
    assert "config.json: activation must be" in refused(activation="relu")
    assert "config.json: snake_logscale must be true or false, got 1" in refused(snake_logscale=1)
    assert "config.json: in_channels must be an integer" in refused(num_mels=1e3)
    assert "config.json: " in (said := refused(without=["activation"])) and "activation" in said
    taps = "activation_post.upsample.filter"
    short = state | {taps: torch.ones(1, 1, 11)}
    assert f"tensor '{taps}' must have shape (1, 1, 12), got (1, 1, 11)" in refused(short)
    del short[taps]
    assert f"tensor '{taps}' is missing" in refused(short)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(activation=["snake"]), 'activation must be "snake" or "snakebeta"'),
        (dict(use_bias_at_final="no"), "use_bias_at_final must be true or false, got 'no'"),
        (dict(use_tanh_at_final=None), "use_tanh_at_final must be true or false, got None"),
        (dict(upsample_rates=(4, 2, 2)), "upsample_kernel_sizes must have for each"),
        (dict(upsample_rates=(1,) * 65), "upsample_rates must be a sequence of 1 to 64 sizes"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)
