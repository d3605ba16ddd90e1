import dataclasses

import torch

from aigc_fast import ops
from tests.op_samples.sample import OpSamples, Refusal, Sample, rand

#: (rows, width) of decoding, prompts and training
SHAPES = [(1, 1536), (1, 14336), (64, 1536), (1024, 1536), (4096, 5632)]


def _samples(largest: float = torch.inf) -> list[Sample]:
    special = torch.tensor(
        [0.0, -0.0, 1e-30, -80.0, 80.0, -100.0, 100.0, 1e4, largest, -torch.inf, torch.nan]
    ).double()
    packed = rand(2, 5, 38)
    return [
        Sample("rows", (rand(2, 3, 17), rand(2, 3, 17, seed=1))),
        Sample("halves", packed.chunk(2, -1)),
        Sample("tiny_halves", tuple(rand(7, 2).chunk(2, -1))),
        Sample("cut_in_both", (packed[:, 1:4, :19], rand(2, 3, 19))),
        Sample("vector", (rand(127), rand(127, seed=1))),
        Sample("one", (rand(1, 1), rand(1, 1, seed=1))),
        Sample("no_rows", (rand(0, 3, 8), rand(0, 3, 8))),
        Sample("no_columns", (rand(3, 0), rand(3, 0))),
        Sample("expanded", (rand(1, 19).expand(4, 19), rand(4, 19)), differentiable=False),
        Sample("special", (special, torch.ones(11).double()), differentiable=False),
        Sample("long", (rand(8197), rand(8197, seed=1)), differentiable=False),
        Sample("long_halves", tuple(rand(2, 4000).chunk(2, -1)), differentiable=False),
        Sample("threads", tuple(rand(9, 20000).chunk(2, -1)), differentiable=False),
    ]


def _refusals() -> list[Refusal]:
    x = rand(2, 4)
    return [
        Refusal("dtype", (x.to(torch.int32), x), TypeError, "gate must be float64"),
        Refusal("no_dimension", (rand(), rand()), ValueError, "gate must have at least 1 dim"),
        Refusal("up_dtype", (x, x.float()), TypeError, "up must have the dtype of gate"),
        Refusal("up_shape", (x, rand(4)), ValueError, r"up must have shape \(2, 4\)"),
        Refusal("sparse", (x.to_sparse(), x), TypeError, "gate must be a strided tensor"),
    ]


def _geglu_samples() -> list[Sample]:
    # torch's own gelu of inf is NaN in its vectorised fp32 form: our test of geglu has inf.
    return [
        dataclasses.replace(s, name=f"{approximate}_{s.name}", kwargs={"approximate": approximate})
        for approximate in ("none", "tanh")
        for s in _samples(largest=1e30)
    ]


def _geglu_refusals() -> list[Refusal]:
    args, kwargs = (rand(2, 4), rand(2, 4)), {"approximate": "erf"}
    message = "approximate must be 'none' or 'tanh', got 'erf'"
    return [*_refusals(), Refusal("approximate", args, ValueError, message, kwargs)]


def _large() -> list[Sample]:
    return [Sample(f"{rows}x{width}", rand(rows, 2 * width).chunk(2, -1)) for rows, width in SHAPES]


OPS = {
    "swiglu": OpSamples(ops.swiglu, _samples, _refusals, _large),
    "geglu": OpSamples(ops.geglu, _geglu_samples, _geglu_refusals, _large),
}
