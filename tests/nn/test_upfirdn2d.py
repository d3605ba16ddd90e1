"""The FIR modules: sizes, gains, and their meaning by hand."""

import pytest
import torch
import torch.nn.functional as F

from aigc_fast.nn import Blur, Downsample2d, Upsample2d


@pytest.mark.parametrize("factor", [2, 3])
def test_constant_images_stay_constant_inside(factor) -> None:
    x = torch.full((2, 3, 12, 12), 0.7)
    up, down = Upsample2d(factor=factor)(x), Downsample2d(factor=factor)(x)
    assert up.shape == (2, 3, 12 * factor, 12 * factor)
    assert down.shape == (2, 3, 12 // factor, 12 // factor)
    assert Blur()(x).shape == x.shape
    assert list(Blur().state_dict()) == ["kernel"] and "4, 4" in repr(Blur())
    if factor == 2:  # the four taps fill the gaps of two evenly
        torch.testing.assert_close(up[..., 4:-4, 4:-4], torch.full((2, 3, 16, 16), 0.7))
        torch.testing.assert_close(down[..., 1:-1, 1:-1], torch.full((2, 3, 4, 4), 0.7))


def test_upsample_is_a_transposed_convolution() -> None:
    module = Upsample2d().double()
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    taps = module.kernel.expand(3, 1, 4, 4)
    want = F.conv_transpose2d(x, taps, stride=2, padding=1, groups=3)
    torch.testing.assert_close(module(x), want)
    down = Downsample2d().double()
    want = F.conv2d(x, down.kernel.flip((0, 1)).expand(3, 1, 4, 4), stride=2, padding=1, groups=3)
    torch.testing.assert_close(down(x), want)
