"""FIR upsampling with bias_act, and downsampling, beside the plain PyTorch path of StyleGAN."""

import pytest
import torch
import torch.nn.functional as F

from tests.op_samples import OPS

OP = OPS["upfirdn2d"]


def spread(x, up, padding):
    """Zeros inserted and added at the sides by pad and reshape."""
    n, c, h, w = x.shape
    left, right, top, bottom = padding if isinstance(padding, tuple) else (padding,) * 4
    if up > 1:
        x = F.pad(x.reshape(n, c, h, 1, w, 1), [0, up - 1, 0, 0, 0, up - 1])
        x = x.reshape(n, c, h * up, w * up)
    return F.pad(x, [left, right, top, bottom])


def eager(x, filter, up=1, down=1, padding=0, gain=1.0, bias=None, act="linear"):
    """Zeros, a depthwise convolution, then the elementwise chain."""
    c = x.shape[1]
    x = spread(x, up, padding)
    taps = (filter * gain).flip((0, 1)).expand(c, 1, -1, -1)
    x = F.conv2d(x, taps, stride=down, groups=c)
    if bias is not None:
        x = x + bias.view(1, -1, 1, 1)
    return F.leaky_relu(x, 0.2) * 2**0.5 if act == "lrelu" else x


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", OP.large(), ids=lambda s: s.name)
def bench_upfirdn2d(measure, sample, dtype, direction) -> None:
    measure(OP, sample, dtype, eager=eager, backward=direction != "forward")
