"""RMS norm and rotary embedding of packed query and key heads, half-split layout."""

import pytest
import torch
import torch.nn.functional as F

from tests.op_samples import OPS

OP = OPS["qk_norm_rotary"]


def eager(x, query_weight, key_weight, cos, sin, num_heads, eps=1e-6):
    query, key = x[:, :, :num_heads], x[:, :, num_heads:]
    shape = query_weight.shape
    x = torch.cat(
        (F.rms_norm(query, shape, query_weight, eps), F.rms_norm(key, shape, key_weight, eps)), 2
    )
    cos, sin = cos[:, None], sin[:, None]
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", OP.large(), ids=lambda s: s.name)
def bench_qk_norm_rotary(measure, sample, dtype, direction) -> None:
    measure(OP, sample, dtype, eager=eager, backward=direction != "forward")
