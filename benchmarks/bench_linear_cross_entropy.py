"""The loss of a language model and the gradients of its hidden states and last matrix."""

import pytest
import torch
import torch.nn.functional as F

from tests.op_samples import OPS

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def cross_entropy(logits, target):
    """As transformers computes it: in float32 at least."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), target)


def linear_cross_entropy(x, weight, target):
    return cross_entropy(F.linear(x, weight), target)


@DTYPES
@pytest.mark.parametrize("sample", OPS["cross_entropy"].large(), ids=lambda s: s.name)
def bench_cross_entropy(measure, sample, dtype) -> None:
    measure(OPS["cross_entropy"], sample, dtype, eager=cross_entropy, backward=True)


@DTYPES
@pytest.mark.parametrize("sample", OPS["linear_cross_entropy"].large(), ids=lambda s: s.name)
def bench_linear_cross_entropy(measure, sample, dtype) -> None:
    measure(OPS["linear_cross_entropy"], sample, dtype, eager=linear_cross_entropy, backward=True)
