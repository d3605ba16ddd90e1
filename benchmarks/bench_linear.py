"""Dense products where MKL leaves AVX-512 unused; elsewhere ours is torch's own function."""

import pytest
import torch
import torch.nn.functional as F

from aigc_fast import ops
from tests.op_samples.sample import OpSamples, Sample, rand

OP = OpSamples(ops.linear, samples=list, refusals=list)


def layer(rows: int, features: int, out: int) -> Sample:
    weight = rand(out, features, seed=1, scale=features**-0.5)
    return Sample(f"{rows}x{features}x{out}", (rand(rows, features), weight, rand(out, seed=2)))


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize(
    "sample", [layer(128, 784, 1024), layer(512, 2048, 2048)], ids=lambda s: s.name
)
def bench_linear(measure, sample, direction) -> None:
    measure(OP, sample, torch.float32, eager=F.linear, backward=direction != "forward")
