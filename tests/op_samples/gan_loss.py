import torch

from aigc_fast import ops
from aigc_fast.ops.gan_loss import LOSSES
from tests.op_samples.sample import OpSamples, Refusal, Sample, rand


def _samples() -> list[Sample]:
    samples = [Sample(loss, (rand(5, 1), rand(5, 1, seed=1), loss)) for loss in LOSSES]
    special = torch.tensor([0.0, -0.0, 1e-30, -1.0, 1.0, -88.0, 89.0, 1e4]).double()
    infinite = torch.tensor([torch.inf, torch.nan, 3.0]).double()
    samples += [
        Sample(f"special_{loss}", (special, special.flip(0), loss), differentiable=False)
        for loss in LOSSES[:3]
    ]
    return [
        *samples,
        Sample("special_infinite", (infinite, infinite.flip(0), "hinge"), differentiable=False),
        Sample("patches", (rand(2, 1, 3, 7, scale=3.0), rand(2, 1, 3, 7, seed=1), "relativistic")),
        Sample("different_sizes", (rand(17), rand(3, seed=1), "hinge")),
        Sample("one", (rand(1), rand(1, seed=1))),
        Sample("parts", (rand(9001, scale=4.0), rand(8193, seed=1)), differentiable=False),
    ]


def _generator_samples() -> list[Sample]:
    samples = [Sample(loss, (rand(5, 1), None, loss)) for loss in LOSSES[:4]]
    return [
        *samples,
        Sample("relativistic", (rand(2, 3, 17), rand(2, 3, 17, seed=1), "relativistic")),
        Sample("parts", (rand(8193, scale=4.0), None), differentiable=False),
    ]


def _refusals() -> list[Refusal]:
    x = rand(4, 1)
    return [
        Refusal("loss", (x, x, "bce"), ValueError, "loss must be one of non_saturating"),
        Refusal("dtype", (x, x.int()), TypeError, "fake must be float64"),
        Refusal("real_dtype", (x.float(), x), TypeError, "real must have the dtype of fake"),
        Refusal("shape", (x, x.T, "relativistic"), ValueError, r"real must have shape \(1, 4\)"),
        Refusal("empty", (x, rand(0, 1)), ValueError, "fake must hold at least one logit"),
    ]


def _generator_refusals() -> list[Refusal]:
    x = rand(4, 1)
    return [
        Refusal("no_real", (x, None, "relativistic"), ValueError, "real must be given for the"),
        Refusal("real", (x, x, "hinge"), ValueError, "real must be given for the"),
        Refusal("empty", (rand(0),), ValueError, "fake must hold at least one logit"),
    ]


OPS = {
    "discriminator_loss": OpSamples(
        ops.discriminator_loss,
        _samples,
        _refusals,
        large=lambda: (
            [Sample(f"64_{loss}", (rand(64, 1), rand(64, 1, seed=1), loss)) for loss in LOSSES]
            + [Sample("16x1x126x126", (rand(16, 1, 126, 126), rand(16, 1, 126, 126, seed=1)))]
        ),
    ),
    "generator_loss": OpSamples(ops.generator_loss, _generator_samples, _generator_refusals),
}
