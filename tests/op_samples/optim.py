import torch
from torch import Tensor

from aigc_fast import ops
from tests.op_samples.sample import OpSamples, Refusal, Sample, channels_last, rand

SHAPES = ((3, 17), (), (127,), (2, 3, 4, 5), (0, 4))


def _step(shapes: tuple = SHAPES, *, averages: bool = False, name: str, **kwargs) -> Sample:
    def some(seed: int) -> list[Tensor]:
        return [rand(*shape, seed=100 * seed + i) for i, shape in enumerate(shapes)]

    squares = [t.square() for t in some(3)]
    steps = [torch.tensor(float(3 * i)) for i in range(len(shapes))]
    args = (some(0), some(1), some(2), squares, steps, some(4) if averages else [])
    return Sample(name, args, kwargs)


def _samples() -> list[Sample]:
    every = {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    mixed = _step(((2, 3, 4, 5),), averages=True, name="mixed_orders", lr=0.01, ema_decay=0.5)
    params, *others, averages = mixed.args
    mixed = Sample("mixed_orders", ([channels_last(params[0])], *others, averages), mixed.kwargs)
    return [
        _step(name="adam"),
        _step(averages=True, name="everything", ema_decay=0.9, **every),
        _step(name="not_decoupled", decoupled=False, **every),
        _step(name="no_momentum", lr=0.01, betas=(0.0, 0.99)),
        _step(((5000,), (3,), (4097,)), averages=True, name="parts", ema_decay=0.99),
        mixed,
        _step(
            ((3, 17),),
            averages=True,
            name="rates",
            rates=torch.tensor([0.1, 0.9]).double(),
            weight_decay=0.1,
        ),
    ]


def _refusals() -> list[Refusal]:
    x, t = rand(3), torch.tensor(0.0)
    return [
        Refusal("dtype", ([x.int()],) * 4 + ([t],), TypeError, r"params\[0\] must be float64"),
        Refusal("count", ([x], [], [x], [x], [t]), ValueError, "grads must be 1 as params, got 0"),
        Refusal(
            "shape", ([x], [rand(4)], [x], [x], [t]), ValueError, r"grads\[0\] must have shape"
        ),
        Refusal(
            "mixed",
            ([x, x.float()],) * 4 + ([t, t],),
            TypeError,
            r"params\[1\] must have the dtype",
        ),
        Refusal(
            "rates",
            ([x], [x], [x], [x], [t]),
            ValueError,
            r"rates must have shape \(2,\)",
            {"rates": rand(3)},
        ),
        Refusal("steps", ([x],) * 4 + ([t.int()],), TypeError, r"steps\[0\] must be float64"),
    ]


def _norm_samples() -> list[Sample]:
    special = torch.tensor([1.0, -0.0, torch.inf, torch.nan]).double()
    return [
        Sample("shapes", ([rand(*s, seed=i) for i, s in enumerate(SHAPES)],)),
        Sample("loss", ([rand(3, 4), channels_last(rand(2, 3, 4, 5))], rand())),
        Sample("special", ([rand(3), special],)),
        Sample("parts", ([rand(9001, scale=3.0), rand(7)],)),
        Sample("zeros", ([torch.zeros(2, 2).double()],)),
    ]


def _norm_refusals() -> list[Refusal]:
    return [
        Refusal("dtype", ([rand(3).int()],), TypeError, r"grads\[0\] must be float64"),
        Refusal("mixed", ([rand(3), rand(3).float()],), TypeError, r"grads\[1\] must have"),
        Refusal("none", ([],), ValueError, "grads must hold at least one tensor"),
        Refusal("loss", ([rand(3)], rand(2)), ValueError, r"loss must have shape \(\)"),
    ]


OPS = {
    "adam_step": OpSamples(
        ops.adam_step,
        _samples,
        _refusals,
        derivatives=0,
        mutates=(0, 2, 3, 4, 5),
    ),
    "gradient_norm": OpSamples(ops.gradient_norm, _norm_samples, _norm_refusals, derivatives=0),
}
