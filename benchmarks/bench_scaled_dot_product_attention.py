"""Attention of many queries: of a U-Net, an autoencoder, a transformer, a prompt, and torch's."""

import pytest
import torch
import torch.nn.functional as F

from aigc_fast import ops
from tests.op_samples.sample import OpSamples, Sample, rand

OP = OpSamples(ops.scaled_dot_product_attention, samples=list, refusals=list)


def attention(
    name: str, n: int, heads: int, queries: int, keys: int, dim: int, kv_heads: int | None = None
) -> Sample:
    """Heads side by side, as projections leave them; with kv_heads that of a prompt."""
    of = (queries, heads), (keys, kv_heads or heads), (keys, kv_heads or heads)
    inputs = [rand(n, *rows, dim, seed=i).transpose(1, 2) for i, rows in enumerate(of)]
    causal = dict(is_causal=True, enable_gqa=True) if kv_heads else {}
    return Sample(f"{name}_{n}x{heads}x{queries}x{keys}x{dim}", tuple(inputs), causal)


SAMPLES = [
    attention("unet", 8, 1, 256, 256, 256),
    attention("autoencoder", 1, 1, 4096, 4096, 512),
    attention("dit", 2, 16, 256, 256, 72),
    attention("text", 2, 8, 1024, 77, 40),
    attention("prompt", 1, 9, 512, 512, 64, kv_heads=3),
    attention("long_prompt", 1, 32, 2048, 2048, 128, kv_heads=8),
]


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.name)
def bench_scaled_dot_product_attention(measure, sample, dtype, direction) -> None:
    eager = F.scaled_dot_product_attention
    measure(OP, sample, dtype, eager=eager, backward=direction != "forward")
