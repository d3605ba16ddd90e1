"""Dense products where torch's are slow (`ops.linear`); elsewhere ours is torch's own function."""

import pytest
import torch
import torch.nn.functional as F

from aigc_fast import ops
from aigc_fast.ops.linear import DTYPES
from tests.op_samples.sample import OpSamples, Sample, rand

OP = OpSamples(ops.linear, samples=list, refusals=list)


def layer(rows: int, features: int, out: int) -> Sample:
    weight = rand(out, features, seed=1, scale=features**-0.5)
    return Sample(f"{rows}x{features}x{out}", (rand(rows, features), weight, rand(out, seed=2)))


LARGE = [layer(128, 784, 1024), layer(512, 2048, 2048)]
# Gradients of large products in float16 take torch seconds.
CASES = [
    *[(sample, torch.float32, way) for sample in LARGE for way in ("forward", "forward_backward")],
    *[(sample, torch.float16, "forward") for sample in LARGE],
    *[(sample, torch.bfloat16, way) for sample in LARGE for way in ("forward", "forward_backward")],
    *[(layer(rows, 2048, 2048), dtype, "forward") for rows in (1, 8) for dtype in DTYPES],
]


@pytest.mark.parametrize(
    ("sample", "dtype", "direction"), CASES, ids=lambda p: getattr(p, "name", str(p))
)
def bench_linear(measure, sample, dtype, direction) -> None:
    measure(OP, sample, dtype, eager=F.linear, backward=direction != "forward")
