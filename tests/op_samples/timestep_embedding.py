import torch

from aigc_fast import ops
from tests.op_samples.sample import OpSamples, Refusal, Sample, rand

#: diffusers': DDPM's U-Net, and that of Stable Diffusion, DiT and Flux
DDPM = dict(flip_sin_to_cos=False, downscale_freq_shift=1.0)
LATENT = dict(flip_sin_to_cos=True, downscale_freq_shift=0.0)


def _call(name: str, timesteps: torch.Tensor, dim: int, **kwargs) -> Sample:
    return Sample(name, (timesteps.double(), dim), kwargs)


def _samples() -> list[Sample]:
    # Whole timesteps are the same in every dtype; bfloat16 has 8 bits for the others.
    whole = torch.tensor([0.0, 1.0, 2.0, 250.0, 992.0])
    return [
        _call("ddpm", whole, 32, **DDPM),
        _call("latent", whole, 32, **LATENT),
        _call("fractional", rand(17) * 3, 10, **LATENT, scale=0.5),
        _call("odd", whole, 7),
        _call("period", whole, 16, max_period=100.0, scale=-2.0),
        _call("large", torch.tensor([3e4, 49152.0, -65024.0]), 48, **LATENT),
        _call("blocks", whole[:2] + 3, 600, **LATENT),
        _call("many", torch.linspace(0, 7, 300), 4, **LATENT),
        _call("one_column", whole, 1),
        _call("no_timesteps", torch.empty(0), 8),
    ]


def _refusals() -> list[Refusal]:
    t = rand(3)
    return [
        Refusal("dtype", (t.to(torch.complex64), 8), TypeError, "timesteps must be float64"),
        Refusal("matrix", (rand(3, 1), 8), ValueError, "timesteps must have 1 dimensions"),
        Refusal("scalar", (torch.tensor(1.0), 8), ValueError, "timesteps must have 1 dimensions"),
        Refusal("dim", (t, 0), ValueError, "dim must be positive, got 0"),
        Refusal("shift", (t, 2), ValueError, r"downscale_freq_shift must be less than .* = 1, got"),
    ]


OPS = {
    "timestep_embedding": OpSamples(
        ops.timestep_embedding,
        _samples,
        _refusals,
        large=lambda: [
            _call("1x128", torch.tensor([500.0]), 128, **DDPM),
            _call("64x320", torch.arange(64.0), 320, **LATENT),
        ],
    )
}
