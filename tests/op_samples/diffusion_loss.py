import torch

from aigc_fast import ops
from aigc_fast.ops.diffusion_loss import PREDICTION_TYPES
from tests.op_samples.sample import OpSamples, Refusal, Sample, channels_last, rand

V = {"prediction_type": "v_prediction"}


def _call(*shape: int, name: str = "", weighted: bool = True, **kwargs) -> Sample:
    angle = rand(shape[0], seed=3).abs()
    args = (rand(*shape), rand(*shape, seed=1), rand(*shape, seed=2), angle.cos(), angle.sin())
    weights = rand(shape[0], seed=4).abs() if weighted else None
    name = name or "x".join(map(str, shape))
    return Sample(name, (*args, weights), kwargs, differentiable=args[0].numel() < 500)


def _samples() -> list[Sample]:
    nhwc = tuple(channels_last(rand(2, 4, 5, 3, seed=i)) for i in range(3))
    scales = (rand(2), rand(2, seed=1))
    special = torch.tensor([[0.0, -0.0, 1e-30, 1e4, torch.inf, -torch.inf, torch.nan]]).double()
    special = special.expand(2, -1)
    return [
        _call(3, 4, 5, 7, **V, name="velocity"),
        *(_call(3, 5, 7, prediction_type=name, name=name) for name in PREDICTION_TYPES),
        _call(2, 3, 9, weighted=False, **V, name="no_weights"),
        Sample("channels_last", (*nhwc, *scales, None), V),
        Sample("mixed_orders", (nhwc[0], nhwc[1].contiguous(), nhwc[2], *scales, scales[0]), V),
        Sample("special", (special, special, special.flip(1), *scales), V, differentiable=False),
        _call(17, **V, name="numbers"),
        _call(1, 1, **V),
        _call(33, 3, **V),
        _call(2, 9000, **V),
    ]


def _refusals() -> list[Refusal]:
    x, a = rand(2, 3), rand(2)
    return [
        Refusal(
            "type", (x, x, x), ValueError, "prediction_type must be one", {"prediction_type": "x0"}
        ),
        Refusal("no_scales", (x, x, x, a), ValueError, "alpha and sigma must be given", V),
        Refusal("dtype", (x.int(), x, x), TypeError, "model_output must be float64"),
        Refusal("noise_dtype", (x, x, x.float()), TypeError, "sample and noise must have one"),
        Refusal("two_dtypes", (x.half(), x.half(), x.float(), a, a), TypeError, "one dtype", V),
        Refusal("shape", (x, x, rand(2, 4)), ValueError, r"noise must have shape \(2, 3\)"),
        Refusal("alpha", (x, x, x, rand(3), a), ValueError, r"alpha must have shape \(2,\)", V),
        Refusal("sigma", (x, x, x, a, a.int()), TypeError, "sigma must be float64", V),
        Refusal("weights", (x, x, x, a, a, x), ValueError, r"weights must have shape \(2,\)"),
        Refusal("no_sample", (x, None, x, a, a), TypeError, "sample must be a torch.Tensor", V),
        Refusal("empty", (rand(2, 0),) * 3, ValueError, "model_output must be a batch and not"),
        Refusal("no_batch", (rand(),) * 3, ValueError, "model_output must be a batch and not"),
    ]


OPS = {
    "diffusion_loss": OpSamples(
        ops.diffusion_loss,
        _samples,
        _refusals,
        large=lambda: [
            _call(16, 4, 64, 64, **V),
            _call(16, 16, 128, 128, **V),
        ],
        constants=(1, 2, 3, 4, 5),
    ),
}
