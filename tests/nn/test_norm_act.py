"""The modules against torch's own, over several batches and with its weights in them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aigc_fast.nn import (
    AdaptiveInstanceNorm,
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    InstanceNormAct,
    MinibatchStddev,
    PixelNormAct,
)

SHAPES = {
    (9, 6): (BatchNormAct1d, nn.BatchNorm1d),
    (4, 6, 5): (BatchNormAct1d, nn.BatchNorm1d),
    (4, 6, 5, 3): (BatchNormAct2d, nn.BatchNorm2d),
    (2, 6, 2, 3, 2): (BatchNormAct3d, nn.BatchNorm3d),
}


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"momentum": None}, {"eps": 0.8}, {"affine": False}, {"track_running_stats": False}],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_batch_norm_and_activation(shape, kwargs) -> None:
    ours_of, theirs_of = SHAPES[shape]
    ours = ours_of(6, **kwargs, act="lrelu", alpha=0.1, dtype=torch.float64)
    theirs = theirs_of(6, **kwargs, dtype=torch.float64)
    for p in theirs.parameters():
        nn.init.normal_(p)
    ours.load_state_dict(theirs.state_dict())
    for _ in range(3):
        x = 3 + torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(ours(x), F.leaky_relu(theirs(x), 0.1))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), F.leaky_relu(theirs(x), 0.1))


def test_checks_the_shape_as_torch_does_and_describes_itself() -> None:
    with pytest.raises(ValueError, match="expected 4D input"):
        BatchNormAct2d(3)(torch.randn(2, 3))
    assert "6, eps=1e-05" in repr(BatchNormAct2d(6, act="lrelu")) and "act=lrelu, alpha=0.2" in repr(InstanceNormAct(6, act="lrelu", alpha=0.2))  # fmt: skip  # noqa: E501
    assert repr(PixelNormAct()) == "PixelNormAct(act=linear)"


@pytest.mark.parametrize("affine", [True, False])
def test_is_instance_norm_and_activation(affine) -> None:
    ours = InstanceNormAct(6, 1e-3, affine=affine, act="tanh", dtype=torch.float64)
    theirs = nn.InstanceNorm2d(6, 1e-3, affine=affine, dtype=torch.float64)
    for p in theirs.parameters():
        nn.init.normal_(p)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(ours(x), torch.tanh(theirs(x)))


def test_adaptive_instance_norm_takes_scale_and_shift_of_a_style() -> None:
    layer = AdaptiveInstanceNorm(7, 6, act="lrelu")
    assert list(layer.state_dict()) == ["fc.weight", "fc.bias"]
    x, style = torch.randn(3, 6, 4, 5), torch.randn(3, 7)
    scale, shift = layer.fc(style)[..., None, None].chunk(2, 1)
    want = F.leaky_relu(F.instance_norm(x) * (1 + scale) + shift, 0.2)
    torch.testing.assert_close(layer(x, style), want)


def test_minibatch_stddev_tells_how_much_a_group_differs() -> None:
    x = torch.randn(6, 4, 3, 3)
    y = MinibatchStddev(group_size=3, num_channels=2)(x)
    assert y.shape == (6, 6, 3, 3) and torch.equal(y[:, :4], x)
    for sample in range(6):  # the samples of a group lie two apart
        group = x[sample % 2 :: 2]
        for k in range(2):
            want = (group[:, 2 * k : 2 * k + 2].var(0, correction=0) + 1e-8).sqrt().mean()
            torch.testing.assert_close(y[sample, 4 + k], want.expand(3, 3))
    # Three of six samples, as four divide no six.
    torch.testing.assert_close(MinibatchStddev(4, num_channels=2)(x), y, rtol=0, atol=0)
    assert MinibatchStddev(None)(torch.zeros(5, 4)).shape == (5, 5)
    with pytest.raises(ValueError, match="num_channels .3. must divide the channels of x"):
        MinibatchStddev(num_channels=3)(x)
