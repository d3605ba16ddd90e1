"""Bias, activation, gain and clamp: forward, and forward with backward."""

import pytest
import torch
import torch.nn.functional as F

from tests.op_samples import OPS

OP = OPS["bias_act"]


def eager(x, bias, dim, act, *, clamp):
    y = F.leaky_relu(x + bias.view(1, -1, 1, 1), 0.2) * 2**0.5
    return y.clamp(-clamp, clamp)


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", OP.large(), ids=lambda s: s.name)
def bench_bias_act(measure, sample, dtype, direction) -> None:
    measure(OP, sample, dtype, eager=eager, backward=direction != "forward")
