"""The adaLN chain of a diffusion transformer's block."""

import pytest
import torch
import torch.nn.functional as F

from tests.op_samples import OPS

NORM, RMS_NORM = OPS["modulated_layer_norm"], OPS["modulated_rms_norm"]
RESIDUAL, BOTH = OPS["gated_residual"], OPS["gated_residual_norm"]

directions = pytest.mark.parametrize("direction", ["forward", "forward_backward"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def eager_norm(x, scale, shift):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def eager_rms_norm(x, scale, shift, eps=1e-6):
    return F.rms_norm(x, x.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]


def eager_residual(residual, x, gate):
    return residual + gate[:, None] * x


def eager_both(residual, x, gate, scale, shift):
    h = eager_residual(residual, x, gate)
    return eager_norm(h, scale, shift), h


@directions
@dtypes
@pytest.mark.parametrize("sample", NORM.large(), ids=lambda s: s.name)
def bench_modulated_layer_norm(measure, sample, dtype, direction) -> None:
    measure(NORM, sample, dtype, eager=eager_norm, backward=direction != "forward")


@directions
@dtypes
@pytest.mark.parametrize("sample", RMS_NORM.large(), ids=lambda s: s.name)
def bench_modulated_rms_norm(measure, sample, dtype, direction) -> None:
    measure(RMS_NORM, sample, dtype, eager=eager_rms_norm, backward=direction != "forward")


@directions
@dtypes
@pytest.mark.parametrize("sample", RESIDUAL.large(), ids=lambda s: s.name)
def bench_gated_residual(measure, sample, dtype, direction) -> None:
    measure(RESIDUAL, sample, dtype, eager=eager_residual, backward=direction != "forward")


@directions
@dtypes
@pytest.mark.parametrize("sample", BOTH.large(), ids=lambda s: s.name)
def bench_gated_residual_norm(measure, sample, dtype, direction) -> None:
    measure(BOTH, sample, dtype, eager=eager_both, backward=direction != "forward")
