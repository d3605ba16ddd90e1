import torch

from aigc_fast import ops
from aigc_fast.ops.elbo import LIKELIHOODS
from tests.op_samples.sample import OpSamples, Refusal, Sample, channels_last, rand


def _gaussian(*shape: int, name: str = "", noise: bool = True) -> Sample:
    """shape: of the sample. Log-variances are mostly small, where e^x - 1 - x cancels."""
    parameters = torch.cat([rand(*shape), rand(*shape, seed=1, scale=0.7)], 1)
    args = (parameters, rand(*shape, seed=2) if noise else None)
    name = name or "x".join(map(str, shape))
    return Sample(name, args, differentiable=parameters.numel() < 500)


def _samples() -> list[Sample]:
    x = _gaussian(2, 2, 4, 5)
    # Means, log-variances at and beyond their bounds, and what is no number.
    means = torch.tensor([[0.0, -0.0, 1e-30, 3.0, -4.0, 1.0, 2.0, 0.0]])
    bounds = torch.tensor([[-30.0, 20.0, -31.0, 21.0, -1e4, 1e4, 1e-6, 0.33]])
    special = torch.cat([means, bounds], 1).double()
    infinite = torch.tensor(
        [[torch.inf, torch.nan, 0.0, torch.inf, torch.nan, -torch.inf]]
    ).double()
    return [
        _gaussian(3, 4, 5, 7, name="images"),
        _gaussian(5, 17, name="vectors"),
        _gaussian(2, 3, 9, noise=False, name="mode"),
        Sample("channels_last", (channels_last(x.args[0]), channels_last(x.args[1]))),
        Sample("mixed_orders", (channels_last(x.args[0]), x.args[1])),
        Sample("wide", (rand(2, 6, 3, scale=8.0), rand(2, 3, 3))),
        Sample("special", (special, rand(1, 8)), differentiable=False),
        Sample("special_infinite", (infinite, rand(1, 3)), differentiable=False),
        _gaussian(0, 4, 3),
        _gaussian(2, 1, 0),
        _gaussian(1, 1),
        _gaussian(2, 2, 4500),
    ]


def _refusals() -> list[Refusal]:
    x = rand(2, 4, 3)
    return [
        Refusal("dtype", (x.int(), None), TypeError, "parameters must be float64"),
        Refusal("odd", (rand(2, 3), None), ValueError, r"parameters must have shape \(batch, 2 \*"),
        Refusal("flat", (rand(4), None), ValueError, r"parameters must have shape \(batch, 2 \*"),
        Refusal("noise", (x, x), ValueError, r"noise must have shape \(2, 2, 3\)"),
        Refusal("noise_dtype", (x, rand(2, 2, 3).float()), TypeError, "noise must have the dtype"),
    ]


def _pair(*shape: int, kind: str = "bernoulli", name: str = "") -> Sample:
    target = rand(*shape, seed=1)
    args = (rand(*shape, scale=3.0), target.sigmoid() if kind == "bernoulli" else target, kind)
    return Sample(name or kind, args, differentiable=target.numel() < 500)


def _loss_samples() -> list[Sample]:
    binary = torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.5, 1.0]]).double()
    logits = torch.tensor([[0.0, -0.0, 25.0, 25.0, -1e4, 1e4, 1e-30, torch.nan]]).double()
    infinite = torch.tensor([[torch.inf, -torch.inf, 1.0], [torch.nan, 0.0, 0.0]]).double()
    nhwc = channels_last(rand(2, 3, 4, 5))
    return [
        *(_pair(3, 5, 7, kind=kind) for kind in LIKELIHOODS),
        Sample("special", (logits, binary), differentiable=False),
        *(
            Sample(f"special_{kind}", (infinite, infinite.flip(0), kind), differentiable=False)
            for kind in LIKELIHOODS[1:]
        ),
        Sample("channels_last", (nhwc, channels_last(rand(2, 3, 4, 5, seed=1)), "gaussian")),
        Sample("mixed_orders", (nhwc, rand(2, 3, 4, 5, seed=1).sigmoid())),
        _pair(17, kind="laplace", name="numbers"),
        _pair(0, 5, name="no_batch"),
        _pair(2, 0, kind="gaussian", name="no_pixels"),
        _pair(2, 9000, name="pieces"),
    ]


def _loss_refusals() -> list[Refusal]:
    x = rand(2, 3)
    return [
        Refusal("kind", (x, x, "poisson"), ValueError, "kind must be one of bernoulli, gaussian"),
        Refusal("dtype", (x.int(), x), TypeError, "output must be float64"),
        Refusal("target_dtype", (x, x.float()), TypeError, "target must have the dtype of output"),
        Refusal("shape", (x, rand(3, 2)), ValueError, r"target must have shape \(2, 3\)"),
        Refusal("no_batch", (rand(), rand()), ValueError, "output must have a batch dimension"),
    ]


OPS = {
    "sample_gaussian": OpSamples(
        ops.sample_gaussian,
        _samples,
        _refusals,
        large=lambda: [
            _gaussian(256, 32),
            _gaussian(1, 4, 64, 64),
            _gaussian(64, 4, 32, 32),
        ],
    ),
    "reconstruction_loss": OpSamples(
        ops.reconstruction_loss,
        _loss_samples,
        _loss_refusals,
        large=lambda: [
            _pair(128, 784, name="128x784"),
            _pair(8, 3, 256, 256, kind="gaussian", name="8x3x256x256_gaussian"),
            _pair(8, 3, 256, 256, kind="laplace", name="8x3x256x256_laplace"),
        ],
        constants=(1,),
    ),
}
