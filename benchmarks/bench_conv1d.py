"""A vocoder's convolutions along time with leaky ReLU before and a residual after: of sequences
with channels innermost and, as torch has them, contiguous. Forward, and forward with backward."""

import pytest
import torch
import torch.nn.functional as F

from tests.op_samples import OPS


def eager_conv1d(x, weight, bias, residuals, padding, dilation, slope):
    y = F.conv1d(F.leaky_relu(x, slope), weight, bias, padding=padding, dilation=dilation)
    return y + residuals[0]


def eager_conv_transpose1d(x, weight, bias, stride, padding, slope):
    return F.conv_transpose1d(F.leaky_relu(x, slope), weight, bias, stride, padding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", OPS["conv1d"].large(), ids=lambda s: s.name)
def bench_conv1d(measure, sample, dtype) -> None:
    measure(OPS["conv1d"], sample, dtype, eager=eager_conv1d)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", OPS["conv_transpose1d"].large(), ids=lambda s: s.name)
def bench_conv_transpose1d(measure, sample, dtype) -> None:
    measure(OPS["conv_transpose1d"], sample, dtype, eager=eager_conv_transpose1d)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", OPS["conv1d"].large(), ids=lambda s: s.name)
def bench_conv1d_backward(measure, sample, dtype) -> None:
    measure(OPS["conv1d"], sample, dtype, eager=eager_conv1d, backward=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", OPS["conv_transpose1d"].large(), ids=lambda s: s.name)
def bench_conv_transpose1d_backward(measure, sample, dtype) -> None:
    measure(OPS["conv_transpose1d"], sample, dtype, eager=eager_conv_transpose1d, backward=True)
