"""swiglu over the two halves of one packed projection."""

import pytest
import torch
import torch.nn.functional as F

from tests.op_samples import OPS

OP = OPS["swiglu"]


def eager(gate, up):
    return F.silu(gate) * up


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", OP.large(), ids=lambda s: s.name)
def bench_swiglu(measure, sample, dtype, direction) -> None:
    measure(OP, sample, dtype, eager=eager, backward=direction != "forward")
