"""The convolutions of the family: all of them go through these two functions."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


def convolve(
    x: Tensor,
    conv: nn.Module,
    slope: float = 1.0,
    residuals: Sequence[Tensor] = (),
    gain: float = 1.0,
) -> Tensor:
    """gain * (conv(leaky_relu(x, slope)) + sum(residuals)), differentiable.

    x:         (batch, channels, time), of any strides.
    conv:      an nn.Conv1d.
    slope:     of the leaky ReLU before the convolution, at least 0; 1 is none.
    residuals: tensors of the shape of the result.
    """
    assert isinstance(conv, nn.Conv1d)
    y = conv(_activate(x, slope))
    for residual in residuals:
        y = y + residual
    return y if gain == 1 else y * gain


def upsample(x: Tensor, conv: nn.Module, slope: float = 1.0) -> Tensor:
    """conv(leaky_relu(x, slope)), differentiable; conv is an nn.ConvTranspose1d.

    x and slope are as for `convolve`.
    """
    assert isinstance(conv, nn.ConvTranspose1d)
    return conv(_activate(x, slope))


def _activate(x: Tensor, slope: float) -> Tensor:
    return x if slope == 1 else F.leaky_relu(x, slope)
