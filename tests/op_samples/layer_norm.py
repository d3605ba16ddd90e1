import torch
from torch import Tensor

from aigc_fast import ops
from tests.op_samples.sample import OpSamples, Refusal, Sample, rand

#: (batch, tokens, width) of diffusion transformers: DiT-S and DiT-XL at 256 pixels, a video model
SHAPES = [(4, 256, 384), (2, 256, 1152), (1, 4096, 1536)]


def _special() -> Tensor:
    x = rand(2, 4, 5)
    x[0, 0, 2], x[0, 1, 3], x[0, 2, 0] = torch.nan, torch.inf, -torch.inf
    x[0, 3], x[1, 0] = 0, 3e3 * x[1, 0]
    x[1, 1] *= 1e-20
    return x


def _shapes() -> list[tuple[str, Tensor, tuple[int, ...]]]:
    """(name, x, shape of the modulation)"""
    packed = rand(2, 6, 40)
    return [
        ("sample", rand(2, 6, 17), (2, 17)),
        ("frame", rand(2, 6, 17), (2, 3, 17)),
        ("token", rand(2, 6, 17), (2, 6, 17)),
        ("vectors", rand(3, 33), (3, 33)),
        ("video", rand(2, 2, 3, 8), (2, 2, 8)),
        ("slice", packed[..., 3:36], (2, 33)),
        ("no_samples", rand(0, 3, 8), (0, 8)),
        ("no_tokens", rand(2, 0, 8), (2, 8)),
        ("special", _special(), (2, 5)),
        ("blocks", rand(1, 301, 31), (1, 31)),
        ("wide", rand(2, 5, 1025), (2, 1025)),
        ("threads", rand(2, 70, 1025), (2, 7, 1025)),
    ]


def _call(name: str, x: Tensor, *rest, **kwargs) -> Sample:
    return Sample(name, (x, *rest), kwargs, x.numel() < 500 and name != "special")


def _modulated(affine: int = 2) -> list[Sample]:
    samples = []
    for i, (name, x, shape) in enumerate(_shapes()):
        width = shape[-1]
        own = (rand(width, seed=3), rand(width, seed=4))[:affine] if i % 2 else ()
        pair = rand(*shape[:-1], 3 * width, seed=1).chunk(3, -1)[1:]  # of a packed projection
        samples.append(_call(name, x, *pair, *own))
    large_mean = rand(2, 3, 127) + 30.0
    samples.append(
        Sample("large_mean", (large_mean, rand(2, 127), rand(2, 127, seed=1)), {}, False)
    )
    samples.append(_call("eps", rand(2, 3, 8, scale=0.03), rand(2, 8), rand(2, 8, seed=1), eps=0.1))
    begins_apart = rand(2, 3, 1025)
    begins_apart[..., :40] += 1e3
    samples.append(
        Sample("begins_apart", (begins_apart, rand(2, 1025), rand(2, 1025, seed=1)), {}, False)
    )
    return samples


def _plain() -> list[Sample]:
    samples = [
        _call(name, x, rand(shape[-1], seed=3), rand(shape[-1], seed=4))
        for name, x, shape in _shapes()
    ]
    samples += [
        Sample("vector", (rand(127), rand(127, seed=1))),
        Sample("weight", (rand(4, 9), rand(9, seed=1)), {"eps": 1e-2}),
        Sample("expanded", (rand(1, 19).expand(4, 19), rand(1).expand(19)), differentiable=False),
    ]
    return samples


def _gated(*more: int, affine: bool = False) -> list[Sample]:
    samples = []
    for i, (name, x, shape) in enumerate(_shapes()):
        residual = torch.empty_like(x).copy_(rand(*x.shape, seed=5))
        parts = rand(*shape[:-1], 3 * shape[-1], seed=1).chunk(3, -1)[: 1 + len(more)]
        own = (rand(shape[-1], seed=3), rand(shape[-1], seed=4)) if affine and i % 2 else ()
        parts = tuple(p.contiguous() for p in parts) if name == "special" else parts
        samples.append(_call(name, residual, x, *parts, *own))
    return samples


def _rms(samples: list[Sample]) -> list[Sample]:
    keep = [s for s in samples if s.name in ("sample", "frame", "token", "slice", "blocks")]
    return [
        Sample(f"rms_{s.name}", s.args[:6], {**s.kwargs, "norm": "rms"}, s.differentiable)
        for s in keep
    ]


def _plain_refusals() -> list[Refusal]:
    x, w = rand(2, 4), rand(4)
    return [
        Refusal("dtype", (x.int(), w, w), TypeError, "x must be float64"),
        Refusal("no_dimension", (rand(), w), ValueError, "x must have at least"),
        Refusal("weight", (x, rand(3)), ValueError, r"weight must have shape \(4,\)"),
        Refusal("bias_dtype", (x, w, w.float()), TypeError, "bias must have the dtype of x"),
    ]


def _refusals() -> list[Refusal]:
    x, p, w = rand(2, 6, 4), rand(2, 4), rand(4)
    message = r"scale must have shape \(batch, width\) or \(batch, frames, width\)"
    return [
        Refusal("dtype", (x.int(), p, p), TypeError, "x must be float64"),
        Refusal("vector", (rand(4), p, p), ValueError, "x must have at least 2 dimensions"),
        Refusal("scale_dtype", (x, p.float(), p), TypeError, "scale must have the dtype of x"),
        Refusal("scale", (x, rand(1, 4), rand(1, 4)), ValueError, message),
        Refusal("frames", (x, rand(2, 4, 4), rand(2, 4, 4)), ValueError, message),
        Refusal("shift", (x, p, rand(2, 6, 4)), ValueError, r"shift must have shape \(2, 4\)"),
        Refusal("weight", (x, p, p, rand(3)), ValueError, r"weight must have shape \(4,\)"),
        Refusal("weight_dtype", (x, p, p, w.float()), TypeError, "weight must have the dtype"),
    ]


def _gated_refusals(*more: Tensor) -> list[Refusal]:
    x, p = rand(2, 6, 4), rand(2, 4)
    message = r"gate must have shape \(batch, width\) or \(batch, frames, width\)"
    return [
        Refusal("dtype", (x.int(), x.int(), p, *more), TypeError, "x must be float64"),
        Refusal("residual", (x[:1], x, p, *more), ValueError, r"residual must have shape \(2, 6"),
        Refusal("residual_dtype", (x.float(), x, p, *more), TypeError, "residual must have the"),
        Refusal("gate", (x, x, rand(2, 3), *more), ValueError, message),
    ]


def _both_refusals() -> list[Refusal]:
    x, p = rand(2, 6, 4), rand(2, 4)
    return [
        *_gated_refusals(p, p),
        Refusal("scale", (x, x, p, rand(2, 6, 4), p), ValueError, r"scale must have shape \(2, 4"),
        Refusal("norm", (x, x, p, p, p), ValueError, "norm must be", {"norm": "batch"}),
    ]


def _large(rows: int, modulations: int) -> list[Sample]:
    return [
        Sample(
            "x".join(map(str, shape)),
            (
                *(rand(*shape, seed=i) for i in range(rows)),
                *rand(shape[0], 6 * shape[-1]).chunk(6, -1)[:modulations],
            ),
        )
        for shape in SHAPES
    ]


OPS = {
    "layer_norm": OpSamples(ops.layer_norm, _plain, _plain_refusals),
    "modulated_layer_norm": OpSamples(
        ops.modulated_layer_norm, _modulated, _refusals, lambda: _large(1, 2)
    ),
    "modulated_rms_norm": OpSamples(
        ops.modulated_rms_norm, lambda: _modulated(1), _refusals, lambda: _large(1, 2)
    ),
    "gated_residual": OpSamples(ops.gated_residual, _gated, _gated_refusals, lambda: _large(2, 1)),
    "gated_residual_norm": OpSamples(
        ops.gated_residual_norm,
        lambda: (own := _gated(1, 2, affine=True)) + _rms(own),
        _both_refusals,
        lambda: _large(2, 3),
    ),
}
