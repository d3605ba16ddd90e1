"""What the table of samples does not say of upfirdn2d."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from aigc_fast import backend, ops
from tests.op_samples import channels_last, rand


def test_by_hand() -> None:
    x, taps = rand(2, 3, 5, 6), rand(3, 4)
    up = x.new_zeros(2, 3, 10, 18)
    up[:, :, ::2, ::3] = x
    full = F.conv2d(F.pad(up, [2, 1, 0, 3]), taps.flip((0, 1)).expand(3, 1, 3, 4), groups=3)
    got = ops.upfirdn2d(x, taps, up=(3, 2), down=(2, 1), padding=(2, 1, 0, 3), gain=1.5)
    torch.testing.assert_close(got, 1.5 * full[:, :, :, ::2])


def test_separable_filter_is_its_outer_product() -> None:
    x, taps = rand(2, 3, 9, 7), rand(6)
    options = {"up": 2, "down": 3, "padding": (4, 3), "bias": rand(3), "act": "lrelu"}
    one, two = (ops.upfirdn2d(x, f, **options) for f in (taps, torch.outer(taps, taps)))
    torch.testing.assert_close(one, two)


def test_third_derivative() -> None:
    taps, bias = rand(3, 3), rand(2).requires_grad_()
    x = rand(1, 2, 4, 4).requires_grad_()

    def gradient(x, bias):
        y = ops.upfirdn2d(x, taps, up=2, padding=1, bias=bias, act="tanh")
        return torch.autograd.grad(y.sin().sum(), (x, bias), create_graph=True)

    assert torch.autograd.gradgradcheck(gradient, (x, bias), fast_mode=True)


def test_keeps_channels_last() -> None:
    y = ops.upfirdn2d(channels_last(rand(2, 3, 4, 5)), rand(2, 2), up=2)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_filter_has_no_gradient() -> None:
    with pytest.raises(ValueError, match="filter must not require a gradient"):
        ops.upfirdn2d(rand(1, 1, 3, 3), rand(2, 2).requires_grad_())


def test_rows_of_several_units_and_phases() -> None:
    x, taps = rand(1, 2, 90, 70), rand(5, 7)
    for up, down in ((1, 1), (3, 1), (1, 3), (5, 2), (2, 5), (2, 4)):
        got = ops.upfirdn2d(x, taps, up, down, padding=(-4, 5, 6, -7))
        nhwc = ops.upfirdn2d(channels_last(x), taps, up, down, padding=(-4, 5, 6, -7))
        with backend("reference"):
            want = ops.upfirdn2d(x, taps, up, down, padding=(-4, 5, 6, -7))
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(nhwc, want)


@pytest.mark.parametrize("shape", ["row", "image"])
def test_matches_reference_at_every_bound(shape) -> None:
    """Rows shorter than a vector and longer, filters longer than the rows, crops into the image."""
    cases = itertools.product((1, 2, 17, 40), (1, 2, 6, 23), (1, 2, 3, 5), (1, 2, 3, 4))
    for number, (size, count, up, down) in enumerate(cases):
        x, taps = rand(1, 2, 3, size, seed=number), rand(count, seed=number)
        if shape == "image":
            taps = torch.outer(taps[:2], taps)
        left = (count - 3, -2, count, -1 - up)[number % 4]  # the other end makes the filter fit
        right = max(count + 5 - left - size * up, (-3, 0, 4)[number % 3])
        call = x, taps, (up, 1 + number % 2), (down, 1 + number % 3), (left, right, count, count)
        got = ops.upfirdn2d(*call)
        with backend("reference"):
            torch.testing.assert_close(got, ops.upfirdn2d(*call))
