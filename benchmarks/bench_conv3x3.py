"""A 3x3 convolution with bias and PReLU, channels_last: one pass, and two."""

import pytest
import torch
import torch.nn.functional as F

from tests.op_samples import OPS

OP = OPS["conv3x3"]


def eager(x, weight, bias, slope):
    return F.prelu(F.conv2d(x, weight, bias, padding=1), slope)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", OP.large(), ids=lambda s: s.name)
def bench_conv3x3(measure, sample, dtype) -> None:
    measure(OP, sample, dtype, eager=eager)
