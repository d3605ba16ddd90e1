"""The modules against what they stand for in torch, with torch's own weights in them."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aigc_fast.nn import GEGLU, BiasAct, LinearBiasAct, RMSNorm, SwiGLU


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


def test_swiglu():
    gate, up = torch.randn(2, 3, 17, dtype=torch.float64)
    assert_same(SwiGLU()(gate, up), F.silu(gate) * up)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_geglu(approximate):
    gate, up = torch.randn(2, 3, 17, dtype=torch.float64)
    module = GEGLU(approximate)
    assert_same(module(gate, up), F.gelu(gate, approximate=approximate) * up)
    assert approximate in repr(module)


@pytest.mark.parametrize("module", [LinearBiasAct(7, 5, "lrelu", gain=1.0), BiasAct(7), RMSNorm(7)])
def test_modules_describe_themselves(module):
    assert "7" in repr(module)
