import torch
import torch.nn.functional as F
from torch import Tensor

from aigc_fast import ops
from tests.op_samples.sample import OpSamples, Refusal, Sample, rand

#: The weights of a residual discriminator of 20 layers.
LARGE = [
    *[(64, 3, 3, 3), (64, 64, 3, 3), (64, 3, 1, 1), (128, 64, 3, 3), (128, 128, 3, 3)],
    *[(128, 64, 1, 1), *[(128, 128, 3, 3)] * 4, (256, 128, 3, 3), (256, 256, 3, 3)],
    *[(256, 128, 1, 1), *[(256, 256, 3, 3)] * 4, (256, 256), (64, 256), (1, 64)],
]


def unit(size: int, seed: int) -> Tensor:
    return F.normalize(rand(size, seed=seed), dim=0)


def _call(name: str, *shapes: tuple[int, ...], iterations: int = 1) -> Sample:
    """Derivatives are those with u and v held: the numeric ones are so without iterations.
    u and v are estimates, as later calls have them."""
    weights = [rand(*shape, seed=i) for i, shape in enumerate(shapes)]
    u = [unit(w.shape[0], seed=i) for i, w in enumerate(weights)]
    v = [F.normalize(a @ w.flatten(1), dim=0) for a, w in zip(u, weights, strict=True)]
    u = [F.normalize(w.flatten(1) @ b, dim=0) for b, w in zip(v, weights, strict=True)]
    args = weights, u, v, *([] if iterations == 1 else [iterations])
    return Sample(name, args, {}, iterations == 0)


def _samples() -> list[Sample]:
    shapes = (7, 3, 1, 2), (5, 4), (1, 1)
    return [
        _call("held", *shapes, iterations=0),
        _call("one_step", *shapes),
        _call("three_steps", *shapes, iterations=3),
        _call("pieces", (5, 1030), (1, 17), (131, 27)),
        _call("cpu_pieces", (35, 1030)),
        Sample(
            "special_zero", ([torch.zeros(3, 4).double()], [unit(3, 0)], [unit(4, 1)]), {}, False
        ),
    ]


def _refusals() -> list[Refusal]:
    w, u, v = rand(3, 4), unit(3, 0), unit(4, 0)
    return [
        Refusal("none", ([], [], []), ValueError, "weights must not be empty"),
        Refusal("dtype", ([w.int()], [u], [v]), TypeError, r"weights\[0\] must be float64"),
        Refusal(
            "mixed", ([w, w.float()], [u, u], [v, v]), TypeError, r"weights\[1\] must have the"
        ),
        Refusal("vector", ([u], [u], [v]), ValueError, r"weights\[0\] must have at least 2"),
        Refusal("empty", ([w[:0]], [u[:0]], [v]), ValueError, r"weights\[0\] must have at least"),
        Refusal("count", ([w], [u, u], [v]), ValueError, "u must have 1 tensors, got 2"),
        Refusal("u", ([w], [v], [v]), ValueError, r"u\[0\] must have shape \(3,\)"),
        Refusal("v", ([w], [u], [u]), ValueError, r"v\[0\] must have shape \(4,\)"),
        Refusal("v_dtype", ([w], [u], [v.float()]), TypeError, r"v\[0\] must have the dtype"),
        Refusal("iterations", ([w], [u], [v], -1), ValueError, "iterations must be at least 0"),
    ]


OPS = {
    "spectral_norm": OpSamples(
        ops.spectral_norm,
        _samples,
        _refusals,
        large=lambda: [
            _call("20_layers", *LARGE),
            _call("20_small_layers", *[(32, 16, 3, 3)] * 20),
        ],
        constants=(1, 2),
    )
}
