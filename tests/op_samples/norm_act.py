import torch

from aigc_fast import ops
from tests.op_samples.sample import OpSamples, Refusal, Sample, channels_last, rand


def _statistics(channels: int) -> tuple:
    return rand(channels, seed=5), rand(channels, seed=6).square() + 0.1


def _affine(*shape: int) -> tuple:
    return 1 + 0.3 * rand(*shape, seed=7), rand(*shape, seed=8)


def _training(name: str, x: torch.Tensor, act: str, differentiable: bool = True, **rest) -> Sample:
    args = (x, None, None, *_affine(x.shape[1]), True, 0.1, rest.pop("eps", 1e-5), act)
    return Sample(name, args, rest, differentiable)


def _evaluation(name: str, x: torch.Tensor, act: str) -> Sample:
    c = x.shape[1]
    return Sample(f"eval_{name}", (x, *_statistics(c), *_affine(c), False, 0.1, 1e-5, act))


def _special() -> torch.Tensor:
    x = rand(3, 4, 5)
    x[0, 0, 0], x[1, 1, 1] = torch.nan, torch.inf
    x[:, 2] = 0.25
    x[:, 3] *= 1e15
    return x


def _batch() -> list[Sample]:
    x = rand(4, 3, 6)
    return [
        _training("lrelu", rand(3, 4, 5, 5), "lrelu"),
        _training("swish", rand(3, 4, 5, 5), "swish"),
        _training("channels_last", channels_last(rand(2, 18, 5, 3)), "lrelu", gain=0.7),
        _training("channels_last_swish", channels_last(rand(2, 18, 5, 3)), "swish"),
        _training("matrix", rand(16, 20), "lrelu", alpha=0.1),
        _training("volume", rand(2, 3, 2, 3, 5), "softplus"),
        _training("one_channel", rand(3, 1, 65), "elu", alpha=0.7, eps=0.8),
        _evaluation("tanh", rand(3, 5, 4, 7), "tanh"),
        _evaluation("channels_last", channels_last(rand(2, 6, 5, 3)), "relu"),
        Sample("no_affine", (x, None, None, None, None, True), {"act": "swish"}),
        Sample("no_bias", (x, None, None, rand(3), None, True)),
        Sample("eval_no_weight", (x, *_statistics(3), None, rand(3), False)),
        _training("two_values", rand(2, 3), "sigmoid", differentiable=False),
        _training("no_channels", rand(3, 0, 2), "relu"),
        _evaluation("empty", rand(0, 4, 2), "relu"),
        _training("special", _special(), "lrelu", differentiable=False),
        _training("large_mean", rand(2, 3, 40, 30) + 300, "lrelu", differentiable=False),
        _training("rows", rand(300, 33), "relu", differentiable=False),
    ]


def _instance() -> list[Sample]:
    volume = rand(2, 3, 2, 3, 4).contiguous(memory_format=torch.channels_last_3d)
    return [
        Sample("lrelu", (rand(3, 4, 5, 5), *_affine(4), 1e-5, "lrelu")),
        Sample("channels_last", (channels_last(rand(2, 18, 5, 3)), *_affine(18), 1e-3, "swish")),
        Sample("of_samples", (rand(3, 4, 17), *_affine(3, 4), 1e-5, "relu")),
        Sample("channels_last_3d", (volume,), {"act": "elu"}),
        Sample("two_values", (rand(2, 3, 2),), {"act": "lrelu"}, differentiable=False),
        Sample("no_samples", (rand(0, 3, 2), *_affine(3))),
        Sample("special", (_special(), *_affine(4)), {"act": "lrelu"}, differentiable=False),
    ]


def _pixel() -> list[Sample]:
    return [
        Sample("lrelu", (rand(2, 18, 3, 5),), {"act": "lrelu"}),
        Sample("channels_last", (channels_last(rand(2, 6, 3, 5)),), {"act": "swish"}),
        Sample("matrix", (rand(5, 17),)),
        Sample("one_channel", (rand(3, 1, 4), 1e-2, "tanh")),
        Sample("empty", (rand(2, 3, 0),)),
        Sample("wide", (rand(2, 40, 9, 33),), {"act": "relu"}, differentiable=False),
        Sample("special", (_special(),), {"act": "lrelu"}, differentiable=False),
    ]


def _refusals() -> list[Refusal]:
    x, b = rand(4, 3, 2), rand(3)
    given = {"running_mean": b, "running_var": b}
    train = {"training": True}
    return [
        Refusal("act", (x, b, b), ValueError, "act must be one of linear", {"act": "gelu"}),
        Refusal("alpha", (x, b, b), ValueError, "alpha must be None", {"act": "relu", "alpha": 1}),
        Refusal("dtype", (x.to(torch.int32), b, b), TypeError, "x must be float64"),
        Refusal("vector", (rand(3), b, b), ValueError, "x must have at least 2 dimensions"),
        Refusal("statistics", (x,), ValueError, "running_mean must be given in evaluation"),
        Refusal("mean", (x, rand(2), b), ValueError, r"running_mean must have shape \(3,\)"),
        Refusal("var", (x, b, rand(1, 3)), ValueError, r"running_var must have shape", train),
        Refusal("weight", (x,), ValueError, "weight must have shape", given | {"weight": b[1:]}),
        Refusal("bias", (x,), TypeError, "bias must be float64", given | {"bias": b.int()}),
        Refusal("one_value", (x[:1, :, :1],), ValueError, "at least 2 values", train),
    ]


def _instance_refusals() -> list[Refusal]:
    x = rand(4, 3, 2)
    return [
        Refusal("weight", (x, rand(4)), ValueError, r"weight must have shape \(C,\) or \(N, C\)"),
        Refusal("one_value", (x[..., :1],), ValueError, "at least 2 values for each mean"),
        Refusal("matrix", (x[..., 0],), ValueError, "at least 2 values for each mean"),
    ]


def _pixel_refusals() -> list[Refusal]:
    return [
        Refusal("vector", (rand(3),), ValueError, "x must have at least 2 dimensions"),
        Refusal("dtype", (rand(3, 2).int(),), TypeError, "x must be float64"),
    ]


def _running(x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor, *rest) -> torch.Tensor:
    return ops.batch_norm_act(x, mean, var, *rest)


def _images(sample) -> list[Sample]:
    """At the size of a DCGAN's layer, in both memory orders."""
    x = rand(64, 128, 32, 32)
    return [sample("64x128x32x32", x), sample("64x128x32x32_nhwc", channels_last(x))]


def _moments() -> list[Sample]:
    return [
        Sample("images", (rand(3, 4, 5, 5),)),
        Sample("channels_last", (channels_last(rand(2, 18, 5, 3)),)),
        Sample("matrix", (rand(16, 20),)),
        Sample("one_value", (rand(1, 3, 1),)),
        Sample("no_samples", (rand(0, 4, 2),)),
        # of an inf the mean is inf or NaN
        Sample("special", (_special().nan_to_num(torch.nan, 1.0),), differentiable=False),
        Sample("large_mean", (rand(2, 3, 40, 30) + 300,), differentiable=False),
    ]


OPS = {
    "channel_moments": OpSamples(
        ops.channel_moments,
        _moments,
        _pixel_refusals,
    ),
    "batch_norm_act": OpSamples(
        ops.batch_norm_act,
        _batch,
        _refusals,
        large=lambda: _images(lambda name, x: _training(name, x, "lrelu")),
        constants=(1, 2),
    ),
    "batch_norm_act_running": OpSamples(
        _running,
        lambda: [
            Sample(
                "momentum",
                (rand(5, 4, 7), *_statistics(4), *_affine(4), True, 0.3, 1e-5, "lrelu"),
            ),
        ],
        list,
        constants=(1, 2),
        mutates=(1, 2),
    ),
    "instance_norm_act": OpSamples(
        ops.instance_norm_act,
        _instance,
        _instance_refusals,
        large=lambda: _images(lambda name, x: Sample(name, (x, *_affine(128), 1e-5, "lrelu"))),
    ),
    "adaptive_instance_norm": OpSamples(
        ops.adaptive_instance_norm,
        lambda: [Sample("lrelu", (rand(3, 4, 5, 3), *_affine(3, 4), 1e-5, "lrelu"))],
        list,
    ),
    "pixel_norm_act": OpSamples(
        ops.pixel_norm_act,
        _pixel,
        _pixel_refusals,
        large=lambda: _images(lambda name, x: Sample(name, (x,), {"act": "lrelu"})),
    ),
}
