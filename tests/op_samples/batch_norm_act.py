import torch

from aigc_fast import ops
from aigc_fast.ops._activations import ACTIVATIONS
from tests.op_samples.sample import OpSamples, Refusal, Sample, channels_last, rand


def _statistics(channels: int) -> tuple:
    return rand(channels, seed=5), rand(channels, seed=6).square() + 0.1


def _affine(channels: int) -> tuple:
    return 1 + 0.3 * rand(channels, seed=7), rand(channels, seed=8)


def _training(
    name: str, x: torch.Tensor, act: str, differentiable: bool = True, **kwargs
) -> Sample:
    c = x.shape[1]
    args = (x, None, None, *_affine(c), True, 0.1, kwargs.pop("eps", 1e-5), act)
    return Sample(name, args, kwargs, differentiable)


def _evaluation(name: str, x: torch.Tensor, act: str, **kwargs) -> Sample:
    c = x.shape[1]
    return Sample(f"eval_{name}", (x, *_statistics(c), *_affine(c), False, 0.1, 1e-5, act), kwargs)


def _samples() -> list[Sample]:
    samples = [_training(act, rand(4, 5, 3, 7), act) for act in ACTIVATIONS]
    samples += [_evaluation(act, rand(3, 5, 4, 7), act) for act in ("lrelu", "swish")]
    special = rand(3, 4, 5)
    special[0, 0, 0], special[1, 1, 1] = torch.nan, torch.inf
    special[:, 2] = 0.25
    special[:, 3] *= 1e15
    return [
        *samples,
        _training("channels_last", channels_last(rand(2, 19, 5, 3)), "lrelu"),
        _training("channels_last_swish", channels_last(rand(2, 18, 5, 3)), "swish", gain=0.7),
        _evaluation("channels_last", channels_last(rand(2, 6, 5, 3)), "tanh"),
        _training("matrix", rand(37, 21), "lrelu", alpha=0.1, gain=1.5),
        _training("eps", rand(9, 11, 5), "swish", eps=0.8),
        _evaluation("matrix", rand(5, 17), "relu"),
        _training("one_channel", rand(3, 1, 127), "elu", alpha=0.7),
        _training("two_values", rand(2, 3), "sigmoid", differentiable=False),
        _training("no_channels", rand(3, 0, 2), "relu"),
        Sample("no_affine", (rand(4, 3, 6), None, None, None, None, True), {"act": "swish"}),
        Sample("no_bias", (rand(4, 3, 6), None, None, rand(3), None, True), {"act": "swish"}),
        Sample("no_weight", (rand(4, 3, 6), *_statistics(3), None, rand(3), False)),
        _evaluation("empty", rand(0, 4, 2), "relu"),
        _training("special", special, "lrelu", differentiable=False),
        _training("blocks", rand(2, 3, 70, 65), "lrelu", differentiable=False),
        _training("rows", rand(700, 33), "sigmoid", differentiable=False),
    ]


def _refusals() -> list[Refusal]:
    x, b = rand(4, 3, 2), rand(3)
    statistics = {"running_mean": b, "running_var": b}
    return [
        Refusal("act", (x, b, b), ValueError, "act must be one of linear", {"act": "gelu"}),
        Refusal("alpha", (x, b, b), ValueError, "alpha must be None", {"act": "relu", "alpha": 1}),
        Refusal("dtype", (x.to(torch.int32), b, b), TypeError, "x must be float64"),
        Refusal("vector", (rand(3), b, b), ValueError, "x must have at least 2 dimensions"),
        Refusal("statistics", (x,), ValueError, "running_mean must be given in evaluation"),
        Refusal("mean", (x, rand(2), b), ValueError, r"running_mean must have shape \(3,\)"),
        Refusal(
            "var",
            (x, b, rand(1, 3)),
            ValueError,
            r"running_var must have shape \(3,\)",
            {"training": True},
        ),
        Refusal(
            "weight", (x,), ValueError, r"weight must have shape", statistics | {"weight": b[1:]}
        ),
        Refusal("bias", (x,), TypeError, "bias must be float64", statistics | {"bias": b.int()}),
        Refusal("one_value", (x[:1, :, :1],), ValueError, "at least 2 values", {"training": True}),
    ]


def _running(x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor, *rest) -> torch.Tensor:
    return ops.batch_norm_act(x, mean, var, *rest)


OPS = {
    "batch_norm_act": OpSamples(
        ops.batch_norm_act,
        _samples,
        _refusals,
        large=lambda: [
            _training("64x128x32x32", rand(64, 128, 32, 32), "lrelu"),
            _training("64x128x32x32_nhwc", channels_last(rand(64, 128, 32, 32)), "lrelu"),
        ],
        constants=(1, 2),
    ),
    "batch_norm_act_running": OpSamples(
        _running,
        lambda: [
            Sample(
                "momentum",
                (rand(5, 4, 7), *_statistics(4), *_affine(4), True, 0.3, 1e-5, "lrelu"),
            ),
            Sample(
                "channels_last",
                (channels_last(rand(2, 18, 5, 3)), *_statistics(18), *_affine(18), True, 0.1),
            ),
        ],
        list,
        constants=(1, 2),
        mutates=(1, 2),
    ),
}
