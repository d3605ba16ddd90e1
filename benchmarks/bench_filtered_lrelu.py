"""StyleGAN3's filtered leaky ReLU beside the plain PyTorch path of its own reference."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.bench_upfirdn2d import spread
from tests.op_samples import OPS

OP = OPS["filtered_lrelu"]


def eager(x, up_filter, down_filter, bias, up, down, padding, clamp):
    """Zeros, padding and a depthwise convolution for each filter, the elementwise chain between."""
    x = x + bias.view(1, -1, 1, 1)
    x = filtered(spread(x, up, padding), up_filter * up)
    x = (F.leaky_relu(x, 0.2) * 2**0.5).clamp(-clamp, clamp)
    return filtered(x, down_filter, down)


def filtered(x, taps, down=1):
    """A depthwise convolution, or two of them for a separable filter."""
    c = x.shape[1]
    if taps.dim() == 2:
        return F.conv2d(x, taps.flip((0, 1)).expand(c, 1, -1, -1), stride=down, groups=c)
    taps = taps.flip(0).expand(c, 1, -1)
    x = F.conv2d(x, taps[:, :, None], stride=(1, down), groups=c)
    return F.conv2d(x, taps[:, :, :, None], stride=(down, 1), groups=c)


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", OP.large(), ids=lambda s: s.name)
def bench_filtered_lrelu(measure, sample, dtype, direction) -> None:
    measure(OP, sample, dtype, eager=eager, backward=direction != "forward")
