"""Whole trajectories beside diffusers' own schedulers, held against a float64 run of theirs."""

from typing import Any

import pytest
import torch
from torch import Tensor

from aigc_fast import schedulers
from tests.ops.test_every_op import assert_as_good_as_torch

diffusers = pytest.importorskip("diffusers")

PREDICTIONS = ("epsilon", "sample", "v_prediction")
BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
SPACINGS = ("leading", "trailing", "linspace")
SHAPE = (2, 3, 8, 9)

DDIM = [
    *({"prediction_type": p, "clip_sample": c, "eta": e}
      for p in PREDICTIONS for c in (False, True) for e in (0.0, 0.7)),
    *({"beta_schedule": b, "timestep_spacing": s, "clip_sample": False}
      for b in BETAS for s in SPACINGS),
    {"steps_offset": 1, "set_alpha_to_one": False, "eta": 1.0, "clip_sample_range": 2.0},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction",
     "timestep_spacing": "trailing"},
]  # fmt: skip
DDPM = [
    *({"prediction_type": p, "clip_sample": c, "variance_type": v}
      for p in PREDICTIONS for c in (False, True)
      for v in ("fixed_small", "fixed_small_log", "fixed_large")),
    *({"beta_schedule": b, "timestep_spacing": s} for b in BETAS for s in SPACINGS),
]  # fmt: skip
DPM = [
    *({"prediction_type": p, "solver_type": s} for p in PREDICTIONS for s in ("midpoint", "heun")),
    *({"beta_schedule": b, "timestep_spacing": s, "lambda_min_clipped": -5.1}
      for b in BETAS for s in SPACINGS),
    {"solver_order": 1},
    {"final_sigmas_type": "sigma_min"},
    {"final_sigmas_type": "sigma_min", "euler_at_final": True},
    {"final_sigmas_type": "sigma_min", "lower_order_final": False},
    {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
     "steps_offset": 1, "timestep_spacing": "leading"},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction",
     "timestep_spacing": "trailing"},
]  # fmt: skip
CASES = [
    pytest.param(name, config, id=f"{name}-{'-'.join(map(str, config.values()))}")
    for name, configs in (
        ("DDIMScheduler", DDIM),
        ("DDPMScheduler", DDPM),
        ("DPMSolverMultistepScheduler", DPM),
    )
    for config in configs
]
#: fewer and more than the 15 below which DPM-Solver++ ends with order 1
STEPS = (7, 20)


def model(sample: Tensor, t: int, prediction_type: str) -> Tensor:
    """A smooth stand-in for a network; the same function in every dtype."""
    if prediction_type == "sample":
        return torch.tanh(sample) * (0.9 - t / 4000)
    return sample / (1 + sample.abs()) + t / 4000


def trajectory(scheduler: Any, dtype: torch.dtype, prediction_type: str, **step: Any) -> Tensor:
    """The samples after every step, from the same start and the same noise."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(SHAPE, dtype=torch.float64, generator=generator)
    sample = start.to(torch.bfloat16).to(dtype)  # the same values in every dtype
    samples = []
    for t in scheduler.timesteps:
        out = scheduler.step(
            model(sample, int(t), prediction_type), t, sample, generator=generator, **step
        )
        sample = out if isinstance(out, Tensor) else out.prev_sample
        samples.append(sample)
    return torch.stack(samples)


class _DoubleTorch:
    """torch, to a diffusers module that upcasts to float32, where the oracle needs float64."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("name", "config"), CASES)
def test_trajectory(name, config, steps, dtype, monkeypatch) -> None:
    ours = getattr(schedulers, name)(**config)
    ours.set_timesteps(steps)
    config = dict(config)
    prediction_type = config.get("prediction_type", "epsilon")
    step = {"eta": config.pop("eta", 0.0)} if name == "DDIMScheduler" else {}

    def theirs() -> Any:
        scheduler = getattr(diffusers, name)(**config)
        scheduler.set_timesteps(steps)
        return scheduler

    assert torch.equal(ours.timesteps, theirs().timesteps)
    got = trajectory(ours, dtype, prediction_type)
    plain = trajectory(theirs(), dtype, prediction_type, **step)
    exactly = theirs()
    module = f"diffusers.schedulers.{type(exactly).__module__.rsplit('.', 1)[1]}"
    if name == "DPMSolverMultistepScheduler":
        monkeypatch.setattr(f"{module}.torch", _DoubleTorch())
    else:  # the noise that the run in `dtype` drew

        def draw(shape: Any, generator: Any, device: Any, dtype: Any, low=dtype) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=low).to(dtype)

        monkeypatch.setattr(f"{module}.randn_tensor", draw)
    exact = trajectory(exactly, torch.float64, prediction_type, **step)
    assert_as_good_as_torch([got], [plain], [exact], dtype)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
@pytest.mark.parametrize("beta_schedule", BETAS)
def test_add_noise(name, beta_schedule) -> None:
    sample, noise = torch.randn(2, *SHAPE)
    timesteps = torch.tensor([0, 999])
    theirs = getattr(diffusers, name)(beta_schedule=beta_schedule)
    ours = getattr(schedulers, name)(beta_schedule=beta_schedule)
    noisy, velocity = ours.add_noise(sample, noise, timesteps, return_velocity=True)
    exact = [
        theirs.add_noise(sample.double(), noise.double(), timesteps),
        theirs.get_velocity(sample.double(), noise.double(), timesteps),
    ]
    plain = [
        theirs.add_noise(sample, noise, timesteps),
        theirs.get_velocity(sample, noise, timesteps),
    ]
    assert_as_good_as_torch([noisy, velocity], plain, exact, torch.float32)


def test_dpm_add_noise_agrees_on_scheduled_timesteps() -> None:
    theirs, ours = diffusers.DPMSolverMultistepScheduler(), schedulers.DPMSolverMultistepScheduler()
    theirs.set_timesteps(10)
    timesteps = theirs.timesteps[[2, 7]]
    sample, noise = torch.randn(2, *SHAPE)
    torch.testing.assert_close(
        ours.add_noise(sample, noise, timesteps), theirs.add_noise(sample, noise, timesteps)
    )
