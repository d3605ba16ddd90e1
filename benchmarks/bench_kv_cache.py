"""append_kv: new keys and values into the caches."""

import pytest
import torch

from tests.op_samples import OPS

OP = OPS["append_kv"]


def eager(key, value, key_cache, value_cache, positions):
    at = positions[:, None] + torch.arange(key.shape[1], device=key.device)
    batch = torch.arange(key.shape[0], device=key.device)[:, None]
    key_cache[batch, at] = key
    value_cache[batch, at] = value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", OP.large(), ids=lambda s: s.name)
def bench_append_kv(measure, sample, dtype) -> None:
    size = torch.finfo(dtype).bits // 8
    moved = 2 * size * sum(t.numel() for t in sample.args[:2])
    measure(OP, sample, dtype, eager=eager, bytes_moved=moved)
