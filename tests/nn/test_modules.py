"""The modules against what they stand for in torch, with torch's own weights in them."""

import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from aigc_fast import ops
from aigc_fast.nn import (
    GEGLU,
    BiasAct,
    Conv2d,
    Conv2dBiasAct,
    GroupNormAct,
    LayerNorm,
    LinearBiasAct,
    ModulatedGroupNormAct,
    ModulatedLayerNorm,
    ModulatedRMSNorm,
    QuantizedLinear,
    RMSNorm,
    Snake,
    SwiGLU,
)


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Float64 throughout: what differs is the order of a few additions."""
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("act", "options", "torch_module"),
    [
        ("lrelu", {"alpha": 0.2, "gain": 1.0}, nn.LeakyReLU(0.2)),
        ("relu", {"gain": 1.0}, nn.ReLU()),
        ("swish", {"gain": 1.0}, nn.SiLU()),
        ("tanh", {}, nn.Tanh()),
        ("linear", {}, nn.Identity()),
    ],
)
def test_linear_bias_act_is_linear_and_activation(act, options, torch_module):
    ours = LinearBiasAct(7, 5, act, **options, dtype=torch.float64)
    linear = nn.Linear(7, 5, dtype=torch.float64)
    ours.load_state_dict(linear.state_dict())
    x = torch.randn(4, 3, 7, dtype=torch.float64)
    assert_same(ours(x), torch_module(linear(x)))


def test_linear_bias_act_keeps_the_defaults_of_the_operator():
    ours = LinearBiasAct(7, 5, "lrelu", clamp=0.5, dtype=torch.float64)
    x = torch.randn(4, 7, dtype=torch.float64)
    plain = F.leaky_relu(F.linear(x, ours.weight, ours.bias), 0.2) * math.sqrt(2)
    assert_same(ours(x), plain.clamp(-0.5, 0.5))


def test_linear_bias_act_without_bias():
    ours = LinearBiasAct(7, 5, "relu", gain=1.0, bias=False, dtype=torch.float64)
    assert list(ours.state_dict()) == ["weight"]
    x = torch.randn(4, 7, dtype=torch.float64)
    assert_same(ours(x), F.relu(F.linear(x, ours.weight)))


def test_bias_act_after_a_convolution():
    conv = nn.Conv2d(3, 6, 3, dtype=torch.float64)
    ours = BiasAct(6, act="swish", gain=1.0, dtype=torch.float64)
    ours.load_state_dict({"bias": conv.bias})
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    assert_same(ours(F.conv2d(x, conv.weight)), F.silu(conv(x)))


@pytest.mark.parametrize("eps", [None, 1e-3])
def test_rms_norm_is_that_of_torch(eps):
    ours = RMSNorm(17, eps, dtype=torch.float64)
    theirs = nn.RMSNorm(17, eps, dtype=torch.float64)
    nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 5, 17, dtype=torch.float64)
    assert_same(ours(x), theirs(x))


@pytest.mark.parametrize(
    ("activation", "torch_module"),
    [
        ("none", nn.Identity()),
        ("silu", nn.SiLU()),
        ("gelu", nn.GELU()),
        ("gelu_tanh", nn.GELU("tanh")),
    ],
)
@pytest.mark.parametrize("affine", [True, False])
def test_group_norm_act_is_group_norm_and_activation(activation, torch_module, affine):
    options = {"eps": 1e-3, "affine": affine, "dtype": torch.float64}
    ours, theirs = (
        GroupNormAct(3, 6, act=activation, **options),
        nn.GroupNorm(3, 6, **options),
    )
    if affine:
        nn.init.normal_(theirs.weight)
        nn.init.normal_(theirs.bias)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    assert_same(ours(x), torch_module(theirs(x)))
    assert activation in repr(ours)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("layout", ["one sample", "contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("activation", "act"),
    [
        ("none", nn.Identity()),
        ("silu", nn.SiLU()),
        ("gelu", nn.GELU()),
        ("gelu_tanh", nn.GELU("tanh")),
    ],
)
def test_modulated_group_norm_act(activation, act, layout, affine) -> None:
    ours = ModulatedGroupNormAct(3, 6, affine=affine, act=activation).double()
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(1 if layout == "one sample" else 2, 6, 5, 4, dtype=torch.float64)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    scale, shift = torch.randn(2, len(x), 6, dtype=torch.float64)
    normed = F.group_norm(x, 3, ours.weight, ours.bias)
    want = act(normed * (1 + scale[:, :, None, None]) + shift[:, :, None, None])
    torch.testing.assert_close(ours(x, scale, shift), want)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_modulated_group_norm_act_under_autocast(layout) -> None:
    norm = ModulatedGroupNormAct(3, 6, act="silu")
    x = torch.randn(2, 6, 5, 4).bfloat16().contiguous(memory_format=layout)
    scale, shift = torch.randn(2, 2, 6)
    with torch.autocast("cpu", torch.bfloat16):
        got = norm(x, scale, shift)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), norm(x.float(), scale, shift), rtol=0.03, atol=0.05)


@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_and_its_modulated_form(affine):
    options = {"eps": 1e-3, "elementwise_affine": affine, "dtype": torch.float64}
    theirs = nn.LayerNorm(17, **options)
    if affine:
        nn.init.normal_(theirs.weight)
        nn.init.normal_(theirs.bias)
    plain, modulated = LayerNorm(17, **options), ModulatedLayerNorm(17, **options)
    x = torch.randn(2, 6, 17, dtype=torch.float64)
    scale, shift = torch.randn(2, 2, 17, dtype=torch.float64)
    for module in (plain, modulated):
        module.load_state_dict(theirs.state_dict())
    assert_same(plain(x), theirs(x))
    assert_same(modulated(x, scale, shift), theirs(x) * (1 + scale[:, None]) + shift[:, None])


def test_modulated_rms_norm():
    ours = ModulatedRMSNorm(17, 1e-3, dtype=torch.float64)
    theirs = nn.RMSNorm(17, 1e-3, dtype=torch.float64)
    nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 6, 17, dtype=torch.float64)
    scale, shift = torch.randn(2, 2, 17, dtype=torch.float64)
    assert_same(ours(x, scale, shift), theirs(x) * (1 + scale[:, None]) + shift[:, None])


def test_swiglu():
    gate, up = torch.randn(2, 3, 17, dtype=torch.float64)
    assert_same(SwiGLU()(gate, up), F.silu(gate) * up)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_geglu(approximate):
    gate, up = torch.randn(2, 3, 17, dtype=torch.float64)
    module = GEGLU(approximate)
    assert_same(module(gate, up), F.gelu(gate, approximate=approximate) * up)
    assert approximate in repr(module)


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric"),
    [(4, 32, False), (4, 64, True), (8, 32, True), (8, None, True)],
)
@pytest.mark.parametrize("bias", [True, False])
def test_quantized_linear_is_linear_with_the_weight_of_its_codes(bits, group_size, symmetric, bias):
    linear = nn.Linear(64, 37, bias, dtype=torch.float64)
    ours = QuantizedLinear.from_linear(linear, bits, group_size, symmetric)
    dense = ops.dequantize_weight(ours.weight, bits, ours.group_size, 37, 64, torch.float64)
    step = linear.weight.abs().max() * (2 if symmetric else 1) / (2**bits - 1 - symmetric)
    assert (dense - linear.weight).abs().max() <= step  # half a step of the widest group at most
    x = torch.randn(3, 2, 64, dtype=torch.float64)
    assert_same(ours(x), F.linear(x, dense, linear.bias))

    kwargs = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    other = QuantizedLinear(64, 37, bias, **kwargs, dtype=torch.float64)
    other.load_state_dict(ours.state_dict())
    assert list(other.state_dict()) == ["weight", "bias"][: 1 + bias]
    assert torch.equal(other(x), ours(x))
    assert not list(ours.parameters()) and f"bits={bits}" in repr(ours)
    assert ours.to(torch.bfloat16).weight.dtype == torch.uint8
    assert ours(x.bfloat16()).dtype == torch.bfloat16


def test_quantized_linear_of_any_width_has_one_scale_a_row():
    linear = nn.Linear(37, 5, dtype=torch.float64)
    ours = QuantizedLinear.from_linear(linear, 8, None, quantize_activations=True)
    assert ours.quantize_activations and ours.group_size == 40
    x = torch.randn(3, 37, dtype=torch.float64)
    torch.testing.assert_close(ours(x), linear(x), rtol=0, atol=0.02)
    with pytest.raises(ValueError, match="x must have in_features = 37 last"):
        ours(torch.randn(3, 38, dtype=torch.float64))


def test_many_rows_of_rounded_activations_are_multiplied_in_bfloat16(monkeypatch):
    """Closer to the layer with activations as they are than int8 is."""
    linear = nn.Linear(96, 40)
    ours = QuantizedLinear.from_linear(linear, 4, 32, quantize_activations=True)
    x = torch.randn(2, 32, 96)
    exact = QuantizedLinear.from_linear(linear, 4, 32)(x)
    errors = []
    for fast in (False, True):
        answer = "aigc_fast.nn.quantized_linear.has_fast_bfloat16"
        monkeypatch.setattr(answer, lambda device, fast=fast: fast)
        y = ours(x)
        assert y.dtype == torch.float32
        errors.append((y - exact).square().mean().sqrt().item())
        assert torch.equal(ours(x[:1, :3]), y[:1, :3]) is not fast  # few rows stay int8
    assert 0 < errors[1] < errors[0]


@pytest.mark.parametrize("module", [LinearBiasAct(7, 5, "lrelu", gain=1.0), BiasAct(7), RMSNorm(7)])
def test_modules_describe_themselves(module):
    assert "7" in repr(module)


def _several() -> tuple[nn.Module, torch.Tensor]:
    layers = Conv2d(16, 16, 3, padding=1), GroupNormAct(4, 16), Conv2dBiasAct(16, 16, 4, 2, 1)
    return nn.Sequential(*layers, Snake(16)), torch.randn(2, 16, 16, 16)


def test_they_are_leaves_of_torch_fx():
    class Tracer(fx.Tracer):
        def is_leaf_module(self, module, name):
            ours = type(module).__module__.startswith("aigc_fast.nn")
            return ours or super().is_leaf_module(module, name)

    model, x = _several()
    traced = fx.GraphModule(model, Tracer().trace(model))
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["0", "1", "2", "3"]
    weights = list(model.parameters())
    found, want = (torch.autograd.grad(m(x).sum(), weights) for m in (traced, model))
    assert all(map(torch.equal, found, want))


@pytest.mark.filterwarnings("ignore")  # of shapes, on which the choice of a kernel depends
@torch.no_grad()
def test_they_are_traced_and_saved_by_torch_jit():
    model, x = _several()
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, x), file)
    file.seek(0)
    loaded, larger = torch.jit.load(file), torch.randn(3, 16, 32, 24)
    assert loaded(x).equal(model(x)) and loaded(larger).equal(model(larger))
