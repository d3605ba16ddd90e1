"""vector_quantize beside the distances to all codes and their argmin in plain PyTorch, which in 16
bits raises them to float32 too: else it would choose other codes.

Only the distances are compared: of 65,536 vectors some lie so near the middle between two codes
that float32 cannot tell which is nearer.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from aigc_fast import ops
from aigc_fast.ops._layout import wide
from tests.op_samples import OPS


def distances(x, codebook):
    return ops.vector_quantize(x, codebook)[2]


def eager(x, codebook):
    with torch.no_grad():
        rows, codes = wide(x), wide(codebook)
        scores = torch.addmm(codes.square().sum(-1), rows, codes.T, alpha=-2)
        indices = scores.argmin(-1)
    quantized = F.embedding(indices, codebook)
    return wide(x - quantized).square().sum(-1)


VECTOR_QUANTIZE = dataclasses.replace(OPS["vector_quantize"], function=distances)


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", VECTOR_QUANTIZE.large(), ids=lambda s: s.name)
def bench_vector_quantize(measure, sample, dtype, direction) -> None:
    measure(VECTOR_QUANTIZE, sample, dtype, eager=eager, backward=direction != "forward")


def eager_moments(x, indices, num_codes):
    rows = wide(x)
    counts = torch.bincount(indices, minlength=num_codes)
    return counts, rows.new_zeros(num_codes, x.shape[1]).index_add_(0, indices, rows)


MOMENTS = OPS["codebook_moments"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", MOMENTS.large(), ids=lambda s: s.name)
def bench_codebook_moments(measure, sample, dtype) -> None:
    measure(MOMENTS, sample, dtype, eager=eager_moments)
