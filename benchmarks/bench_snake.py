"""snake: forward, and forward with backward."""

import pytest
import torch

from tests.op_samples import OPS

OP = OPS["snake"]


def eager(x, alpha, beta):
    """As BigVGAN's SnakeBeta writes it."""
    alpha, beta = alpha[None, :, None], beta[None, :, None]
    return x + (1.0 / (beta + 1e-9)) * torch.pow(torch.sin(x * alpha), 2)


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", OP.large(), ids=lambda s: s.name)
def bench_snake(measure, sample, dtype, direction) -> None:
    measure(OP, sample, dtype, eager=eager, backward=direction != "forward")
