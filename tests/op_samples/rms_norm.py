import torch

from aigc_fast import ops
from tests.op_samples.sample import OpSamples, Refusal, Sample, rand

#: (rows, width) of decoding, prompts and training
SHAPES = [(1, 576), (16, 2048), (256, 4096), (4096, 576), (1024, 8192)]


def _samples() -> list[Sample]:
    special = rand(8, 5)
    special[1, 2], special[2, 3], special[3, 0] = torch.nan, torch.inf, -torch.inf
    special[4] = 0
    special[5, 1], special[6, 2] = 1e30, 6e4
    special[7] = 1e-30
    packed = rand(2, 3, 40)
    return [
        Sample("rows", (rand(2, 3, 17), rand(17))),
        Sample("eps", (rand(4, 127, scale=0.03), rand(127)), {"eps": 1e-2}),
        Sample("no_eps", (rand(5, 33), rand(33)), {"eps": 0.0}),
        Sample("vector", (rand(576), rand(576, seed=1))),
        Sample("one", (rand(3, 1), rand(1, seed=1))),
        Sample("no_rows", (rand(0, 3, 8), rand(8))),
        Sample("no_columns", (rand(3, 0), rand(0))),
        Sample("slice", (packed[..., 7:27], rand(20))),
        Sample("heads", (packed.view(2, 3, 5, 8)[:, :, 1:3], rand(8))),
        Sample("expanded", (rand(1, 19).expand(4, 19), rand(1).expand(19)), differentiable=False),
        Sample("special", (special, rand(5)), differentiable=False),
        Sample("large", (rand(3, 64, scale=200.0), rand(64)), differentiable=False),
        Sample("wide", (rand(2, 5001), rand(5001)), differentiable=False),
        Sample("two_blocks", (rand(1, 8195), rand(8195)), differentiable=False),
        Sample("many_rows", (rand(301, 31), rand(31)), differentiable=False),
        Sample("threads", (rand(70, 1025), rand(1025)), differentiable=False),
    ]


def _refusals() -> list[Refusal]:
    x, w = rand(2, 4), rand(4)
    return [
        Refusal("dtype", (x.to(torch.int32), w), TypeError, "x must be float64"),
        Refusal("no_dimension", (rand(), w), ValueError, "x must have at least 1 dimension"),
        Refusal("weight_dtype", (x, w.float()), TypeError, "weight must have the dtype of x"),
        Refusal("weight_shape", (x, rand(3)), ValueError, r"weight must have shape \(4,\)"),
        Refusal("weight_2d", (x, rand(1, 4)), ValueError, r"weight must have shape \(4,\)"),
        Refusal("sparse", (x.to_sparse(), w), TypeError, "x must be a strided tensor"),
    ]


def _with_residual(sample: Sample) -> Sample:
    x, weight = sample.args
    # The tensor that is added lies in memory as x does.
    residual = torch.empty_like(x).copy_(rand(*x.shape, seed=5))
    if sample.name == "slice":
        residual = rand(2, 3, 20, seed=5)
    return Sample(sample.name, (x, residual, weight), sample.kwargs, sample.differentiable)


def _add_refusals() -> list[Refusal]:
    x, w = rand(2, 4), rand(4)
    refusals = [Refusal(r.name, (r.args[0], x, *r.args[1:]), r.error, r.match) for r in _refusals()]
    return [
        *refusals,
        Refusal("residual_shape", (x, rand(1, 4), w), ValueError, r"residual must have shape \(2"),
        Refusal("residual_dtype", (x, x.half(), w), TypeError, "residual must have the dtype of x"),
    ]


OPS = {
    "rms_norm": OpSamples(
        ops.rms_norm,
        _samples,
        _refusals,
        large=lambda: [
            Sample(f"{rows}x{width}", (rand(rows, width), rand(width))) for rows, width in SHAPES
        ],
    ),
    "add_rms_norm": OpSamples(
        ops.add_rms_norm,
        lambda: [_with_residual(sample) for sample in _samples()],
        _add_refusals,
        large=lambda: [
            Sample(f"{rows}x{width}", (rand(rows, width), rand(rows, width, seed=1), rand(width)))
            for rows, width in SHAPES
        ],
    ),
}
