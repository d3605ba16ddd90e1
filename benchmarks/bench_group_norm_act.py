"""GroupNorm and the activation after it, in both memory orders."""

import pytest
import torch
import torch.nn.functional as F

from tests.op_samples import OPS

OP = OPS["group_norm_act"]


def eager(x, num_groups, weight, bias, *, act):
    assert act == "silu"
    return F.silu(F.group_norm(x, num_groups, weight, bias))


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", OP.large(), ids=lambda s: s.name)
def bench_group_norm_act(measure, sample, dtype, direction) -> None:
    measure(OP, sample, dtype, eager=eager, backward=direction != "forward")
