import torch
from torch import Tensor

from aigc_fast import ops
from tests.op_samples.sample import OpSamples, Refusal, Sample, rand

ALL = {"label_smoothing": 0.1, "softcap": 3.0, "z_loss": 1e-2}
REDUCTIONS = ("mean", "sum", "none")


def targets(*shape: int, classes: int, ignored: int = -100) -> Tensor:
    """Some class for each row; every fifth row is ignored."""
    target = torch.randint(classes, shape, generator=torch.Generator().manual_seed(classes))
    target.view(-1)[3::5] = ignored
    return target


def _call(*shape: int, name: str = "", **kwargs) -> Sample:
    x, target = rand(*shape, scale=2), targets(*shape[:-1], classes=shape[-1])
    name = name or "x".join(map(str, shape))
    return Sample(name, (x, target), kwargs, differentiable=x.numel() < 500)


def _samples() -> list[Sample]:
    extremes = torch.tensor([[90.0, -90, 0, 1e-30], [200, 199, -200, -0.0], [-1e4, -1e4, -1e4, 3]])
    infinite = torch.tensor(
        [[torch.inf, 0, 1], [-torch.inf, 0, 1], [-torch.inf] * 3, [torch.nan, 0, 1]]
    ).double()
    two, four = torch.tensor([1, 0, 3]), torch.tensor([1, 1, 2, 2])
    return [
        *(_call(6, 11, reduction=reduction, name=reduction) for reduction in REDUCTIONS),
        _call(2, 3, 37, name="everything", **ALL),
        *(_call(7, 19, name=name, **{name: value}) for name, value in ALL.items()),
        Sample("ignore_index", (rand(5, 9), targets(5, classes=9, ignored=4)), {"ignore_index": 4}),
        Sample("all_ignored", (rand(2, 9), torch.full((2,), -100)), differentiable=False),
        Sample("extremes", (extremes.double(), two), {"reduction": "none"}, differentiable=False),
        Sample("infinite", (infinite, four), {"reduction": "none"}, differentiable=False),
        Sample("no_rows", (rand(0, 5), two[:0]), {"reduction": "none"}, differentiable=False),
        Sample("one_row", (rand(5), torch.tensor(2))),
        _call(4, 1, name="one_class"),
        _call(3, 4099, **ALL),
        _call(70, 129),
    ]


def _refusals() -> list[Refusal]:
    x, target = rand(3, 5), torch.tensor([0, 4, 2])
    return [
        Refusal("dtype", (x.int(), target), TypeError, "input must be float64"),
        Refusal("target_dtype", (x, target.int()), TypeError, "target must be int64"),
        Refusal("target_shape", (x, target[:2]), ValueError, r"target must have shape \(3,\)"),
        Refusal("no_classes", (rand(3, 0), target), ValueError, "input must have at least one"),
        Refusal("scalar", (rand(), target), ValueError, "input must have at least one"),
        Refusal("too_high", (x, target + 1), ValueError, r"target must be in \[0, 5\)"),
        Refusal("negative", (x, target - 1), ValueError, r"target must be in \[0, 5\).*got -1"),
        *(
            Refusal(name, (x, target), ValueError, message, {name: value})
            for name, value, message in [
                ("reduction", "max", "reduction must be one of mean"),
                ("label_smoothing", 1.5, r"label_smoothing must be in \[0, 1\]"),
                ("softcap", 0.0, "softcap must be positive"),
                ("softcap", torch.inf, "softcap must be"),
                ("z_loss", torch.nan, "z_loss must be finite"),
            ]
        ),
    ]


def _linear_call(rows: int, features: int, classes: int, name: str = "", bias: bool = True, **kwargs) -> Sample:  # noqa: E501  # fmt: skip
    x, weight = rand(rows, features), rand(classes, features, scale=features**-0.5)
    if bias:
        kwargs["linear_bias"] = rand(classes)
    name = name or f"{rows}x{features}x{classes}"
    args = x, weight, targets(rows, classes=classes)
    return Sample(name, args, kwargs, differentiable=x.numel() + weight.numel() < 500)


def _linear_samples() -> list[Sample]:
    x, weight = rand(2, 3, 4), rand(7, 4, seed=1)
    return [
        *(_linear_call(6, 5, 11, reduction=reduction, name=reduction) for reduction in REDUCTIONS),
        _linear_call(7, 3, 37, name="everything", **ALL),
        _linear_call(6, 5, 11, bias=False, name="no_bias"),
        Sample("batch", (x, weight, targets(2, 3, classes=7)), {"reduction": "none"}),
        Sample("no_rows", (x[:0], weight, targets(0, 3, classes=7)), {"reduction": "sum"}),
        Sample("one_row", (rand(16), rand(12, 16), torch.tensor(2))),
        _linear_call(2100, 8, 33),  # more than the least number of rows at a time
    ]


def _linear_refusals() -> list[Refusal]:
    x, weight, target = rand(3, 4), rand(7, 4), torch.tensor([0, 6, 2])
    return [
        Refusal("dtype", (x.int(), weight, target), TypeError, "input must be float64"),
        Refusal("two_dtypes", (x, weight.half(), target), TypeError, "linear_weight must have the"),
        Refusal("features", (x, weight[:, :3], target), ValueError, r"linear_weight \(classes"),
        Refusal("weight_dims", (x, weight[0], target), ValueError, "linear_weight must have 2 dim"),
        Refusal("no_classes", (x, weight[:0], target), ValueError, r"linear_weight \(classes"),
        Refusal("target_dtype", (x, weight, target.int()), TypeError, "target must be int64"),
        Refusal("target_shape", (x, weight, target[:2]), ValueError, r"target must have shape"),
        Refusal("too_high", (x, weight, target + 1), ValueError, r"target must be in \[0, 7\)"),
        Refusal(
            "bias", (x, weight, target), ValueError, r"linear_bias must have shape \(7,\)",
            {"linear_bias": rand(6)},
        ),
        Refusal(
            "reduction", (x, weight, target), ValueError, "reduction must be", {"reduction": "max"}
        ),
    ]  # fmt: skip


OPS = {
    "cross_entropy": OpSamples(
        ops.cross_entropy,
        _samples,
        _refusals,
        large=lambda: [_call(256, 49152), _call(64, 128256)],
    ),
    "linear_cross_entropy": OpSamples(
        ops.linear_cross_entropy,
        _linear_samples,
        _linear_refusals,
        large=lambda: [
            _linear_call(512, 576, 49152, bias=False),
            _linear_call(256, 1024, 32000, bias=False),
        ],
    ),
}
