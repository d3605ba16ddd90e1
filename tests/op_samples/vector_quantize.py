import torch
from torch import Tensor

from aigc_fast import ops
from tests.op_samples.sample import OpSamples, Refusal, Sample, channels_last, rand


def true_derivatives(*args: object, **kwargs: object) -> tuple[Tensor, ...]:
    """With gradients the distances alone: that of `quantized` goes straight through and is not its
    derivative (tests/ops/test_vector_quantize.py has it)."""
    quantized, indices, distances = ops.vector_quantize(*args, **kwargs)  # type: ignore[arg-type]
    return (distances,) if distances.requires_grad else (quantized, indices, distances)


def _samples() -> list[Sample]:
    special = rand(8, 9)
    special[0, 3], special[1, 2], special[2, 0] = torch.nan, torch.inf, -torch.inf
    codes = rand(21, 9, seed=1)
    codes[4, 2], codes[6] = torch.nan, torch.inf
    twice = rand(5, 16)[torch.tensor([0, 1, 0, 2, 1, 2, 3, 4, 3])]
    return [
        Sample("rows", (rand(5, 17), rand(9, 17, seed=1))),
        Sample("image", (rand(2, 8, 3, 5), rand(40, 8, seed=1)), {"dim": 1}),
        Sample("channels_last", (channels_last(rand(2, 8, 3, 5)), rand(6, 8, seed=1)), {"dim": 1}),
        Sample("first_dim", (rand(6, 3, 2), rand(5, 6, seed=1)), {"dim": 0}),
        Sample("one_code", (rand(3, 4), rand(1, 4, seed=1))),
        Sample("no_vectors", (rand(0, 3, 4), rand(5, 4))),
        Sample("special", (special, codes), differentiable=False),
        Sample("ties", (rand(7, 16, seed=1), twice), differentiable=False),
        Sample("far", (rand(9, 12, scale=100.0), rand(30, 12, seed=1)), differentiable=False),
        Sample("blocks", (rand(131, 24), rand(67, 24, seed=1)), differentiable=False),
        Sample("wide", (rand(3, 300), rand(70, 300, seed=1)), differentiable=False),
        Sample("threads", (rand(2, 20, 40, 31), rand(130, 20, seed=1)), {"dim": 1}, False),
    ]


def _drawn(*shape: int, codes: int) -> Tensor:
    return torch.randint(codes, shape, generator=torch.Generator().manual_seed(sum(shape)))


def _moments() -> list[Sample]:
    return [
        Sample("rows", (rand(9, 17), _drawn(9, codes=5), 7)),
        Sample("image", (rand(2, 8, 3, 5), _drawn(2, 3, 5, codes=4), 4), {"dim": 1}),
        Sample("no_vectors", (rand(0, 4), _drawn(0, codes=4), 3)),
        Sample("one_code", (rand(70, 33), torch.zeros(70).long(), 2)),
        Sample("threads", (rand(2500, 40), _drawn(2500, codes=130), 130)),
    ]


def _moments_refusals() -> list[Refusal]:
    x, indices = rand(3, 4), torch.tensor([0, 1, 0])
    return [
        Refusal("dtype", (x.int(), indices, 2), TypeError, "x must be float64"),
        Refusal("indices", (x, indices.int(), 2), TypeError, "indices must be int64"),
        Refusal("shape", (x, indices[:2], 2), ValueError, r"indices must have shape \(3,\)"),
        Refusal("no_codes", (x, indices, 0), ValueError, "num_codes must be at least 1, got 0"),
        Refusal("no_features", (rand(3, 0), indices, 2), ValueError, "at least one feature"),
        Refusal("dim", (x, indices, 2), ValueError, "dim must be from", {"dim": 3}),
    ]


def _refusals() -> list[Refusal]:
    x, codes = rand(2, 4), rand(3, 4)
    return [
        Refusal("dtype", (x.int(), codes), TypeError, "x must be float64"),
        Refusal("other_dtype", (x, codes.float()), TypeError, "codebook must have the dtype of x"),
        Refusal("codebook", (x, rand(4)), ValueError, "codebook must have 2 dimensions"),
        Refusal("features", (x, rand(3, 5)), ValueError, "codebook must have at least one code of"),
        Refusal("no_codes", (x, rand(0, 4)), ValueError, r"got shape \(0, 4\)"),
        Refusal("dim", (x, codes), ValueError, "dim must be from -2 to 1, got 2", {"dim": 2}),
        Refusal("scalar", (rand(), codes), ValueError, "dim must be from"),
    ]


OPS = {
    "vector_quantize": OpSamples(
        true_derivatives,
        _samples,
        _refusals,
        large=lambda: [
            Sample(f"{n}x{dim}_{codes}_codes", (rand(n, dim), rand(codes, dim, seed=1)))
            for n, dim, codes in ((8192, 256, 1024), (4096, 64, 8192), (65536, 8, 2048))
        ],
    ),
    "codebook_moments": OpSamples(
        ops.codebook_moments,
        _moments,
        _moments_refusals,
        large=lambda: [
            Sample(f"{n}x{dim}_{codes}_codes", (rand(n, dim), _drawn(n, codes=codes), codes))
            for n, dim, codes in ((8192, 256, 1024), (65536, 8, 2048))
        ],
        derivatives=0,
    ),
}
