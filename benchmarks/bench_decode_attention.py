"""decode_attention over caches in use, beside torch's scaled_dot_product_attention."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from aigc_fast import ops
from aigc_fast._timing import interleaved
from benchmarks.machine import DEVICE, plain_pass
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
    measure(OP, sample, dtype, eager=eager, limit="read", bytes_moved=moved)


@pytest.mark.parametrize("cached", [8192, 32768])
def bench_narrow_cache(benchmark, quick, cached) -> None:
    """int8 caches with a scale for each head, beside bfloat16 ones."""
    query = torch.randn(1, 1, 32, 128, dtype=torch.bfloat16, device=DEVICE)
    wide = [torch.randn(1, cached, 8, 128, device=DEVICE) for _ in range(2)]
    scales = [x.abs().amax((0, 1, 3)) / 127 for x in wide]
    narrow = [(x / s[:, None]).round().to(torch.int8) for x, s in zip(wide, scales, strict=True)]
    rounded = [x.to(torch.bfloat16) for x in wide]
    lengths = torch.tensor([cached], dtype=torch.int32, device=DEVICE)
    options = dict(zip(("key_scale", "value_scale"), scales, strict=True))

    def ours():
        return ops.decode_attention(query, *narrow, lengths, **options)

    moved = 2 * narrow[0].nbytes
    times = interleaved(
        {
            "ours": ours,
            "bfloat16": lambda: ops.decode_attention(query, *rounded, lengths),
            "read": plain_pass(moved, "read"),
        },
        seconds=0.3 if quick else 3.0,
    )
    benchmark.extra_info.update(
        dtype="int8",
        threads=torch.get_num_threads(),
        seconds=times,
        bfloat16_over_ours=times["bfloat16"] / times["ours"],
        bytes=moved,
        gigabytes_per_second=moved / times["ours"] / 1e9,
        limit="read",
        fraction_of_limit=times["read"] / times["ours"],
    )
    benchmark.pedantic(ours, rounds=3 if quick else 10, warmup_rounds=1)
