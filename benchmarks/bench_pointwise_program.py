"""A program of elementwise instructions beside the operators that it stands for."""

import pytest
import torch

from tests.op_samples import OPS

OP = OPS["pointwise_program"]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="it has no kernel for GPUs")


def eager(inputs, program, scalars):
    (x, m), (sigma, alpha, low, high, next_alpha, next_sigma) = inputs, scalars
    x0 = ((x - sigma * m) / alpha).clamp(low, high)
    return next_alpha * x0 + next_sigma * m, x0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", OP.large(), ids=lambda s: s.name)
def bench_pointwise_program(measure, sample, dtype) -> None:
    measure(OP, sample, dtype, eager=eager)
