"""swiglu and geglu over the two halves of one packed projection, and gelu alone."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from aigc_fast import ops
from tests.op_samples import OPS
from tests.op_samples.sample import OpSamples, Sample, rand

SHAPES = pytest.mark.parametrize("sample", OPS["swiglu"].large(), ids=lambda s: s.name)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
DIRECTIONS = pytest.mark.parametrize("direction", ["forward", "forward_backward"])


def swiglu(gate, up):
    return F.silu(gate) * up


def geglu(gate, up, approximate):
    return F.gelu(gate, approximate=approximate) * up


@DIRECTIONS
@DTYPES
@SHAPES
def bench_swiglu(measure, sample, dtype, direction) -> None:
    measure(OPS["swiglu"], sample, dtype, eager=swiglu, backward=direction != "forward")


@DIRECTIONS
@DTYPES
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("sample", OPS["geglu"].large()[2:4], ids=lambda s: s.name)
def bench_geglu(measure, sample, approximate, dtype, direction) -> None:
    sample = dataclasses.replace(sample, kwargs={"approximate": approximate})
    measure(OPS["geglu"], sample, dtype, eager=geglu, backward=direction != "forward")


@DIRECTIONS
@DTYPES
@pytest.mark.parametrize("shape", [(64, 1280), (2048, 4608)], ids=lambda s: "x".join(map(str, s)))
def bench_gelu(measure, shape, dtype, direction) -> None:
    sample = Sample("tanh", (rand(*shape),), {"approximate": "tanh"})
    op = OpSamples(ops.gelu, samples=list, refusals=list)
    measure(op, sample, dtype, eager=F.gelu, backward=direction != "forward")
