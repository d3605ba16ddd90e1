"""append_kv: new keys and values into the caches."""

import pytest
import torch

from tests.op_samples import OPS

OP = OPS["append_kv"]


def eager(
    key, value, key_cache, value_cache, positions, cos=None, sin=None, key_scale=None,
    value_scale=None,
):  # fmt: skip
    at = positions[:, None] + torch.arange(key.shape[1], device=key.device)
    batch = torch.arange(key.shape[0], device=key.device)[:, None]
    if cos is not None:
        a, b = key.to(torch.promote_types(key.dtype, torch.float32)).chunk(2, -1)
        cos, sin = cos[..., None, :], sin[..., None, :]
        key = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    for x, cache, scale in ((key, key_cache, key_scale), (value, value_cache, value_scale)):
        if scale is not None:
            x = (x / scale[:, None]).round().clamp(-128, 127).to(cache.dtype)
        cache[batch, at] = x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", OP.large(), ids=lambda s: s.name)
def bench_append_kv(measure, sample, dtype) -> None:
    key, _, cache, *_ = sample.args
    read = torch.finfo(dtype).bits // 8
    written = read if cache.is_floating_point() else cache.element_size()
    moved = 2 * key.numel() * (read + written)
    measure(OP, sample, dtype, eager=eager, bytes_moved=moved)
