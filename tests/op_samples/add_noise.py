import torch

from aigc_fast import ops
from tests.op_samples.sample import OpSamples, Refusal, Sample, channels_last, rand


def _call(*shape: int, name: str = "", **kwargs) -> Sample:
    batch = shape[0]
    angle = rand(batch, seed=2).abs()
    args = (rand(*shape), rand(*shape, seed=1), angle.cos(), angle.sin())
    name = name or "x".join(map(str, shape))
    return Sample(name, args, kwargs, differentiable=args[0].numel() < 500)


def _samples() -> list[Sample]:
    v = {"return_velocity": True}
    nhwc = tuple(map(channels_last, (rand(2, 4, 5, 3), rand(2, 4, 5, 3, seed=1))))
    rates = (-torch.ones(2).double(), torch.ones(2).double())
    special = torch.tensor([[0.0, -0.0, 1e-30, 1e4, torch.inf, -torch.inf, torch.nan]]).double()
    half, one = torch.tensor([0.5]).double(), torch.tensor([1.0]).double()
    return [
        _call(3, 4, 5, 7, **v, name="velocity"),
        _call(3, 4, 5, 7, name="plain"),
        _call(3, 4, 5, 7, **v, rates=(rand(3, seed=4), rand(3, seed=5)), name="rates"),
        Sample("rates_interleaved", (*nhwc, rand(2), rand(2, seed=1)), {**v, "rates": rates}),
        Sample("channels_last", (*nhwc, rand(2), rand(2, seed=1)), v),
        Sample("mixed_orders", (nhwc[0], nhwc[1].contiguous(), rand(2), rand(2, seed=1)), v),
        Sample("special", (special, special.flip(1), half, one), v, differentiable=False),
        _call(17, **v, name="numbers"),
        _call(1, 1),
        _call(0, 3, **v),
        _call(2, 0),
        _call(127, 3, **v),
        _call(2, 1025, **v),
        _call(3, 9000, **v),
    ]


def _refusals() -> list[Refusal]:
    x, a = rand(2, 3), rand(2)
    return [
        Refusal("dtype", (x.int(), x, a, a), TypeError, "sample must be float64"),
        Refusal("noise_dtype", (x, x.float(), a, a), TypeError, "noise must have the dtype"),
        Refusal(
            "noise_shape", (x, rand(2, 4), a, a), ValueError, r"noise must have shape \(2, 3\)"
        ),
        Refusal("alpha", (x, x, rand(3), a), ValueError, r"alpha must have shape \(2,\)"),
        Refusal("sigma", (x, x, a, rand(2, 1)), ValueError, r"sigma must have shape \(2,\)"),
        Refusal("sigma_dtype", (x, x, a, a.int()), TypeError, "sigma must be float64"),
        Refusal(
            "rates",
            (x, x, a, a),
            ValueError,
            r"rates\[1\] must have shape \(2,\)",
            {"return_velocity": True, "rates": (a, rand(3))},
        ),
        Refusal(
            "no_velocity",
            (x, x, a, a),
            ValueError,
            "rates are for return_velocity",
            {"rates": (a, a)},
        ),
        Refusal("no_batch", (rand(), rand(), a, a), ValueError, "sample must have a batch"),
    ]


OPS = {
    "add_noise": OpSamples(
        ops.add_noise,
        _samples,
        _refusals,
        large=lambda: [_call(16, 16, 128, 128, return_velocity=True)],
    ),
}
