"""What the modules refuse when they are made, and what they take as torch's do."""

import inspect

import pytest
import torch
from torch import nn

from aigc_fast import nn as fast
from aigc_fast.nn import _fused_layers


@pytest.mark.parametrize(
    "make",
    [
        lambda: fast.BiasAct(4, 1, "mish"),
        lambda: fast.Conv2dBiasAct(3, 4, 3, act="mish"),
        lambda: fast.ConvTranspose2dBiasAct(3, 4, 3, act="relu6"),
        lambda: fast.BatchNormAct2d(3, act="mish"),
        lambda: fast.InstanceNormAct(3, act="mish"),
        lambda: fast.PixelNormAct(act="mish"),
        lambda: fast.EqualizedLinear(3, 4, "mish"),
        lambda: fast.GroupNormAct(2, 8, act="mish"),
    ],
)
def test_refuses_an_unknown_activation(make) -> None:
    with pytest.raises(ValueError, match=r"^act must be one of .*, got"):
        make()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("known", "synonym"), [("silu", "swish"), ("none", "linear")])
def test_synonyms_in_group_norms(known, synonym, channels_last) -> None:
    x, style = torch.randn(2, 4, 3, 5), torch.randn(2, 4)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    for kind, args in ((fast.GroupNormAct, ()), (fast.ModulatedGroupNormAct, (style, style))):
        one, other = (kind(2, 4, act=name) for name in (known, synonym))
        assert one(x, *args).equal(other(x, *args))


@pytest.mark.parametrize(
    ("error", "argument", "make"),
    [
        (TypeError, "hidden_size", lambda: fast.LayerNorm("8")),
        (ValueError, "hidden_size", lambda: fast.LayerNorm((2, 8))),
        (ValueError, "hidden_size", lambda: fast.ModulatedLayerNorm((2, 8))),
        (ValueError, "hidden_size", lambda: fast.RMSNorm((2, 8))),
        (TypeError, "eps", lambda: fast.RMSNorm(8, "small")),
        (TypeError, "gain", lambda: fast.BiasAct(8, gain="high")),
        (TypeError, "act", lambda: fast.LinearBiasAct(8, 4, False)),
        (TypeError, "out_features", lambda: fast.Linear(8, 4.0)),
        (TypeError, "act", lambda: fast.Conv2dBiasAct(3, 4, 3, act=["lrelu"])),
        (ValueError, "clamp", lambda: fast.BiasAct(8, clamp=-1.0)),
        (ValueError, "clamp", lambda: fast.LinearBiasAct(8, 4, clamp=-1.0)),
        (ValueError, "clamp", lambda: fast.Conv2dBiasAct(3, 4, 3, clamp=-1.0)),
        (TypeError, "momentum", lambda: fast.BatchNormAct2d(8, momentum="high")),
        (TypeError, "channels", lambda: fast.SnakeBeta(2.0)),
        (TypeError, "factor", lambda: fast.Upsample2d(factor=2.0)),
        (TypeError, "kernel", lambda: fast.Blur("1331")),
        (ValueError, "bits", lambda: fast.QuantizedLinear(32, 16, bits=0, group_size=32)),
        (ValueError, "group_size", lambda: fast.QuantizedLinear(32, 16, bits=4, group_size=0)),
        (ValueError, "in_features", lambda: fast.QuantizedLinear(100, 16, bits=4, group_size=64)),
        (ValueError, "num_codes", lambda: fast.VectorQuantizer(0, 4)),
        (ValueError, "in_features", lambda: fast.EqualizedLinear(0, 4)),
        (ValueError, "style_dim", lambda: fast.ModulatedConv2d(3, 4, 3, 0)),
        (ValueError, "num_channels", lambda: fast.MinibatchStddev(num_channels=0)),
    ],
)
def test_names_what_it_refuses(error, argument, make) -> None:
    with pytest.raises(error, match=f"^{argument} must be "):
        make()


def test_takes_torchs_own_forms() -> None:
    x = torch.randn(2, 8)
    assert fast.LayerNorm((8,))(x).equal(fast.LayerNorm(8)(x))
    assert fast.RMSNorm([8])(x).equal(fast.RMSNorm(8)(x))
    assert fast.Snake(8, alpha=1).alpha.equal(fast.Snake(8).alpha)


def test_a_momentum_is_not_taken_for_affine() -> None:
    with pytest.raises(TypeError, match="positional"):
        fast.InstanceNormAct(8, 1e-5, 0.1)


@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions_without_a_batch(transposed) -> None:
    kind = fast.ConvTranspose2dBiasAct if transposed else fast.Conv2dBiasAct
    layer, x = kind(8, 4, 3, act="tanh"), torch.randn(8, 4, 4)  # as many rows as channels
    torch.testing.assert_close(layer(x), layer(x[None])[0])


def test_equalized_linear_of_tokens() -> None:
    layer, x = fast.EqualizedLinear(8, 5, "tanh"), torch.randn(2, 5, 8)
    nn.init.normal_(layer.bias)
    torch.testing.assert_close(layer(x), torch.stack([layer(row) for row in x]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rms_norms_own_eps(dtype) -> None:
    x = (torch.randn(3, 64) * 0.02).to(dtype)
    ours, torchs = fast.RMSNorm(64, dtype=dtype), nn.RMSNorm(64, dtype=dtype)
    torch.testing.assert_close(ours(x), torchs(x))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (fast.LayerNorm(8), (2, 8)),
        (fast.RMSNorm(8), (2, 8)),
        (fast.BiasAct(8), (2, 8)),
        (fast.Snake(8), (2, 8, 5)),
        (fast.AliasFreeSnake(8), (2, 8, 5)),
    ],
)
def test_after_a_product_under_autocast(layer, shape) -> None:
    x = torch.randn(shape).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x.float()), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("channels_last", [False, True])
def test_modulated_group_norm_of_volumes(channels_last) -> None:
    layer = fast.ModulatedGroupNormAct(2, 4, act="silu")
    x, scale, shift = torch.randn(2, 4, 3, 5, 2), torch.randn(2, 4), torch.randn(2, 4)
    want = layer(x, scale, shift)
    if channels_last:
        x = x.to(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(layer(x, scale, shift), want)


TORCH_LAYERS = [
    (layer, parent)
    for layer in [*vars(fast).values(), *vars(_fused_layers).values()]
    if isinstance(layer, type) and issubclass(layer, nn.Module)
    for parent in layer.__mro__[1 : layer.__mro__.index(nn.Module)]
    if parent.__module__.startswith("torch.nn.modules") and "forward" in vars(parent)
]


@pytest.mark.parametrize(("layer", "parent"), TORCH_LAYERS)
def test_torch_layers_take_their_argument_by_torchs_name(layer, parent) -> None:
    """Models call `layer(input=...)`, too."""
    torchs, ours = (list(inspect.signature(c.forward).parameters)[1] for c in (parent, layer))
    assert ours == torchs


@pytest.mark.parametrize("cls", [_fused_layers.Biased, _fused_layers.GroupNorm])
def test_fused_layers_take_their_argument_by_torchs_name(cls) -> None:
    assert list(inspect.signature(cls.forward).parameters)[1] == "input"
