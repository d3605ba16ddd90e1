"""What the table of samples does not say of filtered_lrelu."""

import pytest
import torch

from aigc_fast import ops
from tests.op_samples import channels_last, rand


def composed(x, up_filter, down_filter, bias, up, down, padding, gain, slope, clamp):
    """The four operators that it replaces."""
    x = ops.bias_act(x, bias)
    x = ops.upfirdn2d(x, up_filter, up=up, padding=padding, gain=float(up**2))
    x = ops.bias_act(x, act="lrelu", alpha=slope, gain=gain, clamp=clamp)
    return ops.upfirdn2d(x, down_filter, down=down)


@pytest.mark.parametrize("shape", [(6,), (4, 3)], ids=["separable", "image"])
def test_replaces_four_operators(shape) -> None:
    """StyleGAN3's definition: values and gradients, over several strips and words of the mask."""
    args = rand(2, 3, 70, 40), rand(*shape), rand(*shape, seed=1), rand(3)
    inputs = [args[0].requires_grad_(), args[3].requires_grad_()]
    options = {"up": 2, "down": 2, "padding": (6, 5, 4, 7), "gain": 1.3, "slope": 0.1}
    y, want = (f(*args, **options, clamp=0.7) for f in (ops.filtered_lrelu, composed))
    torch.testing.assert_close(y, want)
    upstream = rand(*y.shape, seed=2)
    ours, theirs = (torch.autograd.grad(t, inputs, upstream) for t in (y, want))
    torch.testing.assert_close(ours, theirs)


def test_third_derivative() -> None:
    x, bias, taps = rand(1, 2, 4, 5).requires_grad_(), rand(2).requires_grad_(), rand(4)

    def gradient(x, bias):
        y = ops.filtered_lrelu(x, taps, rand(3, 2), bias, up=2, down=2, padding=3, clamp=1.0)
        return torch.autograd.grad(y.sin().sum(), (x, bias), create_graph=True)

    assert torch.autograd.gradgradcheck(gradient, (x, bias), fast_mode=True)


def test_saves_two_bits_a_pixel() -> None:
    x = torch.randn(1, 4, 32, 32, requires_grad=True)
    taps = torch.ones(2)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.filtered_lrelu(x, taps, taps, up=2, down=2, padding=(1, 0, 1, 0))
    mask = 4 * 64 * 64 * 2 / 8
    assert sum(t.nbytes for t in saved) == mask + 2 * taps.nbytes < x.nbytes


def test_keeps_channels_last() -> None:
    y = ops.filtered_lrelu(channels_last(rand(2, 3, 4, 5)), rand(2), rand(2), up=2, down=2)
    assert y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()
