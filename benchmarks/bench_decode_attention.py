"""decode_attention over caches in use, beside torch's scaled_dot_product_attention."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from tests.op_samples import OPS

OP = OPS["decode_attention"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "sample",
    # torch returns no log-sum-exp: neither do we.
    [dataclasses.replace(s, kwargs={}) for s in OP.large()],
    ids=lambda s: s.name,
)
def bench_decode_attention(measure, sample, dtype) -> None:
    query, key_cache, _, lengths = sample.args
    assert query.shape[1] == 1
    assert lengths.eq(key_cache.shape[1]).all(), "torch gets no lengths: caches must be full"
    in_order: dict = {}

    def eager(query, key_cache, value_cache, cache_lengths):
        # torch's own layout, (batch, heads, sequence, head_dim), made outside the timing.
        if query.dtype not in in_order:
            in_order[query.dtype] = [
                t.transpose(1, 2).contiguous() for t in (key_cache, value_cache)
            ]
        key, value = in_order[query.dtype]
        y = F.scaled_dot_product_attention(query.transpose(1, 2), key, value, enable_gqa=True)
        return y.transpose(1, 2)

    size = torch.finfo(dtype).bits // 8
    moved = size * (2 * key_cache.numel() + 2 * query.numel())
    measure(OP, sample, dtype, eager=eager, reads_only=True, bytes_moved=moved)
