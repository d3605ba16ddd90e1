"""The products of a mixture's experts (`ops.grouped_linear`), beside torch's `grouped_mm`, which
transformers takes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aigc_fast import ops
from tests.op_samples.sample import OpSamples, Sample, rand

OP = OpSamples(ops.grouped_linear, samples=list, refusals=list)


def experts(tokens: int, per_token: int, count: int, features: int, out: int) -> Sample:
    """Each expert with its share of the rows."""
    rows, weight = tokens * per_token, rand(count, out, features, seed=1, scale=features**-0.5)
    ends = torch.tensor([rows * (g + 1) // count for g in range(count)], dtype=torch.int32)
    name = f"{tokens}_to_{per_token}_of_{count}_{features}x{out}"
    return Sample(name, (rand(rows, features), weight, ends))


def grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    # It takes no float64, the truth beside which errors are, and compiled bfloat16 alone.
    if x.dtype == torch.float64 or (torch.compiler.is_compiling() and x.dtype == torch.float32):
        sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
        return torch.cat([a @ w.t() for a, w in zip(x.split(sizes), weight, strict=True)])
    return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)


SAMPLES = [experts(1, 8, 8, 1024, 1024), experts(512, 8, 32, 1024, 1024)]
CASES = [
    (sample, dtype, way)
    for sample in SAMPLES
    for dtype in (torch.float32, torch.bfloat16)
    for way in ("forward", "forward_backward")[: 1 + (sample is SAMPLES[1])]
]


@pytest.mark.parametrize(
    ("sample", "dtype", "direction"), CASES, ids=lambda p: getattr(p, "name", str(p))
)
def bench_grouped_linear(measure, sample, dtype, direction) -> None:
    measure(OP, sample, dtype, eager=grouped_mm, backward=direction != "forward")
