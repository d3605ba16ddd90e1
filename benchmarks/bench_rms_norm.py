"""rms_norm, alone and with the residual sum before it."""

import pytest
import torch
import torch.nn.functional as F

from tests.op_samples import OPS

RMS_NORM, ADD_RMS_NORM = OPS["rms_norm"], OPS["add_rms_norm"]

directions = pytest.mark.parametrize("direction", ["forward", "forward_backward"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def eager(x, weight, eps=1e-6):
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def eager_add(x, residual, weight, eps=1e-6):
    h = x + residual
    return F.rms_norm(h, (h.shape[-1],), weight, eps), h


@directions
@dtypes
@pytest.mark.parametrize("sample", RMS_NORM.large(), ids=lambda s: s.name)
def bench_rms_norm(measure, sample, dtype, direction) -> None:
    measure(RMS_NORM, sample, dtype, eager=eager, backward=direction != "forward")


@directions
@dtypes
@pytest.mark.parametrize("sample", ADD_RMS_NORM.large(), ids=lambda s: s.name)
def bench_add_rms_norm(measure, sample, dtype, direction) -> None:
    measure(ADD_RMS_NORM, sample, dtype, eager=eager_add, backward=direction != "forward")
