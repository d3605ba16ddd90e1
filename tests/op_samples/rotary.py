import torch
from torch import Tensor

from aigc_fast import ops
from tests.op_samples.sample import OpSamples, Refusal, Sample, rand

#: (batch, seq, heads of query and key, head_dim) of decoding, prompts and training
SHAPES = [(1, 1, 12, 64), (8, 1, 40, 128), (1, 256, 12, 64), (1, 4096, 40, 128)]


def angles(*shape: int) -> tuple[Tensor, Tensor]:
    """cos and sin, (..., seq, r / 2)."""
    turn = rand(*shape, seed=11, scale=3.0)
    return turn.cos(), turn.sin()


def _samples() -> list[Sample]:
    packed = rand(2, 3, 8 * 6).view(2, 3, 8, 6)
    special = rand(1, 4, 1, 6)
    special[0, 0, 0, 1], special[0, 1, 0, 4], special[0, 2, 0, 5] = torch.nan, torch.inf, -torch.inf
    samples = []
    for layout, options in (("halves", {}), ("pairs", {"interleaved": True})):
        samples += [
            Sample(name + "_" + layout, args, options)
            for name, args in {
                "all": (rand(2, 3, 2, 10), *angles(3, 5)),
                "batched": (rand(2, 3, 3, 8), *angles(2, 3, 4)),
                "partial": (rand(2, 5, 2, 11), *angles(5, 3)),
                "none": (rand(1, 2, 2, 5), *angles(2, 0)),
                "one": (rand(1, 1, 1, 2), *angles(1, 1)),
                "packed": (packed[:, :, :5], *angles(3, 3)),
                "no_tokens": (rand(2, 0, 2, 6), *angles(0, 3)),
                "no_heads": (rand(2, 3, 0, 6), *angles(3, 3)),
            }.items()
        ]
        samples += [
            Sample(name + "_" + layout, args, options, differentiable=False)
            for name, args in {
                "special": (special, *angles(4, 3)),
                "odd": (rand(1, 3, 2, 254), *angles(3, 127)),
                "shared": (rand(3, 2, 2, 66), *(t.expand(3, 2, 32) for t in angles(1, 2, 32))),
                "threads": (rand(2, 33, 9, 64), *angles(33, 32)),
            }.items()
        ]
    return samples


def _refusals() -> list[Refusal]:
    x, (cos, sin) = rand(2, 3, 4, 10), angles(3, 5)
    return [
        Refusal("dtype", (x.to(torch.int32), cos, sin), TypeError, "x must be float64"),
        Refusal("dimensions", (x[0], cos, sin), ValueError, "x must have 4 dimensions"),
        Refusal("cos_dtype", (x.float(), cos, sin), TypeError, "cos must be float32, got float64"),
        Refusal("cos_low", (x, cos.float(), sin.float()), TypeError, "cos must be float64, got"),
        Refusal("cos_int", (x, cos.int(), sin.int()), TypeError, "cos must be float64, got int32"),
        Refusal("cos_shape", (x, cos[:2], sin[:2]), ValueError, r"cos must have shape \(3, r / 2"),
        Refusal("cos_1d", (x, cos[0], sin[0]), ValueError, r"cos must have shape \(3, r / 2\)"),
        Refusal("cos_batch", (x, *angles(3, 3, 5)), ValueError, r"or \(2, 3, r / 2\)"),
        Refusal("cos_wide", (x, *angles(3, 6)), ValueError, "at most head_dim / 2 = 5 columns"),
        Refusal("sin_shape", (x, cos, sin[:, :4]), ValueError, r"sin must have shape \(3, 5\)"),
        Refusal("sin_dtype", (x, cos, sin.float()), TypeError, "sin must have the dtype of cos"),
    ]


def _large(batch: int, seq: int, heads: int, head_dim: int) -> Sample:
    # Values lie behind the query and key heads of the same packed projection.
    packed = rand(batch, seq, heads + heads // 5, head_dim)
    name = f"{batch}x{seq}x{heads}x{head_dim}"
    return Sample(name, (packed[:, :, :heads], *angles(seq, head_dim // 2)))


OPS = {
    "apply_rotary": OpSamples(
        ops.apply_rotary,
        _samples,
        _refusals,
        large=lambda: [_large(*shape) for shape in SHAPES],
        constants=(1, 2),
    ),
}
