"""Whole trajectories beside diffusers' own schedulers, held against a float64 run of theirs."""

import inspect
import itertools
import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from aigc_fast import schedulers
from tests.ops.test_every_op import assert_as_good_as_torch

diffusers = pytest.importorskip("diffusers")

SHAPE = (8, 3, 8, 9)  # so many starts that the worst errors of two runs can be compared
BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
SPACINGS = ("leading", "trailing", "linspace")
RESPACED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ZERO_SNR = {
    "rescale_betas_zero_snr": True,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
}
THRESHOLD = {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9}


def each(name: str, *values: Any, **others: Any) -> list[dict[str, Any]]:
    return [{name: value, **others} for value in values]


def grid(**axes: Any) -> list[dict[str, Any]]:
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


PREDICTIONS = each("prediction_type", "epsilon", "sample", "v_prediction")
VP = [*PREDICTIONS, *grid(beta_schedule=BETAS, timestep_spacing=SPACINGS)]
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
LAMBDA = [
    *PREDICTIONS,
    *each("timestep_spacing", *SPACINGS),
    *each("solver_order", 1, 3),
    *({name: True} for name in RESPACED),
    FLOW,
    THRESHOLD,
    {**LATENT, "steps_offset": 1, "timestep_spacing": "leading"},
]
SIGMA = [
    *each("prediction_type", "v_prediction"),
    *grid(beta_schedule=BETAS[1:], timestep_spacing=SPACINGS),
    *({name: True} for name in RESPACED),
]
SHIFTED = [
    {},
    {"shift": 3.0},
    {"use_dynamic_shifting": True, "mu": 0.8},
    {"use_dynamic_shifting": True, "mu": 0.8, "time_shift_type": "linear"},
    {"shift": 2.0, "shift_terminal": 0.1},
    *({name: True} for name in RESPACED),
]

#: The configurations of each class. eta, order, s_... are arguments of step, mu of set_timesteps.
CONFIGS: dict[str, list[dict[str, Any]]] = {
    "DDIM": [
        *VP,
        *({**p, "clip_sample": False, "eta": eta} for p in PREDICTIONS for eta in (0.0, 0.7)),
        {"steps_offset": 1, "set_alpha_to_one": False, "eta": 1.0, "clip_sample_range": 2.0},
        {"eta": 0.5, "use_clipped_model_output": True},
        {**ZERO_SNR, "clip_sample": False},
        THRESHOLD,
    ],
    "DDIMInverse": [
        *({**p, "set_alpha_to_one": False, "clip_sample": clip}
          for p in PREDICTIONS for clip in (False, True)),
        {"timestep_spacing": "trailing", "clip_sample": False},
    ],
    "DDPM": [
        *VP,
        *grid(
            variance_type=("fixed_small", "fixed_small_log", "fixed_large"),
            clip_sample=(False, True),
        ),
        *each("variance_type", "learned", "learned_range"),
        {"beta_schedule": "sigmoid"},
        THRESHOLD,
    ],
    "LCM": [
        *PREDICTIONS,
        {"clip_sample": True},
        {"timestep_scaling": 5.0, "set_alpha_to_one": False},
        THRESHOLD,
    ],
    "TCD": [*PREDICTIONS, *each("eta", 0.0, 0.8, 1.0)],
    "CMStochasticIterative": [{}, {"clip_denoised": False, "s_noise": 0.9}],
    "EulerDiscrete": [
        *SIGMA,
        {"prediction_type": "sample"},
        {"final_sigmas_type": "sigma_min"},
        {"interpolation_type": "log_linear"},
        {"timestep_type": "continuous", "prediction_type": "v_prediction"},
        {"sigma_min": 0.05, "sigma_max": 12.0, "use_karras_sigmas": True},
        {"s_churn": 5.0, "s_tmin": 0.1, "s_tmax": 10.0},
        {"s_churn": 3.0, "prediction_type": "v_prediction"},
        ZERO_SNR,
    ],
    "EulerAncestralDiscrete": [
        *grid(beta_schedule=BETAS[1:], timestep_spacing=SPACINGS),
        *each("prediction_type", "v_prediction"),
        ZERO_SNR,
    ],
    "EDMEuler": [
        *grid(sigma_schedule=("karras", "exponential"), final_sigmas_type=("zero", "sigma_min")),
        {"prediction_type": "v_prediction", "sigma_data": 1.0, "sigma_max": 40.0},
        {"s_churn": 5.0},
    ],
    "HeunDiscrete": [*SIGMA, {"prediction_type": "sample"}, {"clip_sample": True}],
    "KDPM2Discrete": SIGMA,
    "KDPM2AncestralDiscrete": [  # whose sigmas, with squaredcos_cap_v2, become NaN
        config
        for config in SIGMA
        if config.get("beta_schedule") != BETAS[2] or config["timestep_spacing"] == "leading"
    ],
    "LMSDiscrete": [*SIGMA, {"prediction_type": "sample"}, *each("order", 1, 2, 3)],
    "PNDM": [
        *grid(skip_prk_steps=(True, False), prediction_type=("epsilon", "v_prediction")),
        *each("timestep_spacing", *SPACINGS, skip_prk_steps=True),
        {**LATENT, "steps_offset": 1, "skip_prk_steps": True, "set_alpha_to_one": True},
    ],
    "IPNDM": [{}],
    "DPMSolverMultistep": [
        *LAMBDA,
        *grid(solver_type=("midpoint", "heun"), algorithm_type=("dpmsolver++", "sde-dpmsolver++")),
        *grid(
            solver_type=("midpoint", "heun"),
            algorithm_type=("dpmsolver", "sde-dpmsolver"),
            final_sigmas_type=("sigma_min",),
        ),
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "solver_order": 3},
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", **THRESHOLD},
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
        {"use_lu_lambdas": True},
        {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min", "euler_at_final": True},
        {"final_sigmas_type": "sigma_min", "lower_order_final": False},
        {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1},
        ZERO_SNR,
    ],
    "DPMSolverSinglestep": [
        *({k: v for k, v in c.items() if k not in ("timestep_spacing", "steps_offset")}
          for c in LAMBDA),
        *grid(solver_type=("midpoint", "heun"), solver_order=(2, 3),
              algorithm_type=("dpmsolver++", "sde-dpmsolver++")),
        *grid(solver_type=("midpoint", "heun"), solver_order=(2, 3),
              algorithm_type=("dpmsolver",), final_sigmas_type=("sigma_min",)),
        {"lower_order_final": True, "solver_order": 3},
    ],
    "EDMDPMSolverMultistep": [
        *grid(sigma_schedule=("karras", "exponential"), final_sigmas_type=("zero", "sigma_min")),
        *each("solver_order", 1, 3),
        {"prediction_type": "v_prediction"},
        {"solver_type": "heun", "algorithm_type": "sde-dpmsolver++"},
        THRESHOLD,
    ],
    "DEISMultistep": LAMBDA,
    "UniPCMultistep": [
        *LAMBDA,
        *grid(solver_type=("bh1", "bh2"), solver_order=(1, 2, 3), predict_x0=(True, False),
              final_sigmas_type=("sigma_min",)),
        {"disable_corrector": [0, 2]},
        {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
        {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"},
        {**FLOW, "shift_terminal": 0.1},
        {**FLOW, "use_dynamic_shifting": True, "mu": 0.7},
        {**FLOW, "use_karras_sigmas": True},
        ZERO_SNR,
    ],
    "SASolver": [
        # With beta sigmas its weights cancel: 1% of the sample is rounding, here and there.
        *(c for c in LAMBDA if not {"solver_order", "use_beta_sigmas"} & set(c)),
        *grid(predictor_order=(1, 2, 3), corrector_order=(1, 2, 3)),
        *grid(predictor_order=(1, 3), algorithm_type=("noise_prediction",)),
        {"tau_func": lambda t: 0.4},
    ],
    "FlowMatchEulerDiscrete": [
        *SHIFTED,
        {"invert_sigmas": True},
        {"stochastic_sampling": True, "shift": 3.0},
    ],
    "FlowMatchLCM": SHIFTED,
    "FlowMatchHeunDiscrete": [{}, {"shift": 3.0}, {"s_churn": 4.0}],
}  # fmt: skip
#: fewer and more than the 15 below which these solvers end with lower orders
TWICE = ("DPMSolver", "EDMDPMSolver", "DEIS", "UniPC", "SASolver")


def named(config: dict[str, Any]) -> list[tuple[str, Any]]:
    """The items of a configuration, functions by their names: the same in every process."""
    return [(key, getattr(value, "__name__", value)) for key, value in config.items()]


CASES = [
    pytest.param(name, config, steps, id=f"{name}-{'-'.join(map(str, named(config)))}-{steps}")
    for name, configs in CONFIGS.items()
    for config in configs
    for steps in ((7, 17) if name.startswith(TWICE) else (9,))
]
OF_STEP = {"eta", "use_clipped_model_output", "order", "s_churn", "s_tmin", "s_tmax"}
FP32_NOISE = {"DPMSolverMultistep", "FlowMatchEulerDiscrete", "FlowMatchLCM"}


def model(sample: Tensor, t: float, config: dict[str, Any]) -> Tensor:
    """A smooth stand-in for a network; the same function in every dtype."""
    share = min(max(float(t) / 1000, 0.0), 1.0)
    if config.get("prediction_type") == "sample":
        return torch.tanh(sample) * (0.9 - share / 4)
    output = sample / (1 + sample.abs()) + share / 4
    if "learned" in config.get("variance_type", ""):
        learned = config["variance_type"] == "learned"
        return torch.cat([output, output.abs() * 0.1 + 0.01 if learned else output.tanh()], 1)
    return output


def trajectory(scheduler: Any, dtype: torch.dtype, config: dict[str, Any], **step: Any) -> Tensor:
    """The samples after every step, from the same start and the same noise."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(SHAPE, dtype=torch.float64, generator=generator)
    sample = start.to(torch.bfloat16).to(dtype)  # the same values in every dtype
    if hasattr(scheduler, "init_noise_sigma"):
        sample = sample * float(scheduler.init_noise_sigma)
    if "generator" in inspect.signature(scheduler.step).parameters:
        step["generator"] = generator
    samples = []
    for t in scheduler.timesteps:
        scaled = sample
        if hasattr(scheduler, "scale_model_input"):
            scaled = scheduler.scale_model_input(sample, t)
        out = scheduler.step(model(scaled.to(dtype), t, config), t, sample, **step)
        sample = out if isinstance(out, Tensor) else out.prev_sample
        samples.append(sample)
    return torch.stack(samples)


class _DoubleTorch:
    """torch, to a diffusers module that upcasts to float32, where the oracle needs float64."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def compare(name: str, config: dict[str, Any], steps: int, dtype: torch.dtype, monkeypatch) -> None:
    if name == "LMSDiscrete" or config.get("use_beta_sigmas"):
        pytest.importorskip("scipy")
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    options = {k: v for k, v in config.items() if k in OF_STEP}
    given = {k: v for k, v in config.items() if k == "mu"}
    config = {k: v for k, v in config.items() if k not in OF_STEP and k != "mu"}

    def make(module: Any) -> Any:
        scheduler = getattr(module, f"{name}Scheduler")(**config)
        scheduler.set_timesteps(steps, **given)
        return scheduler

    ours, plainly, exactly = make(schedulers), make(diffusers), make(diffusers)
    # KDPM2 takes logarithms in fp32, which torch and numpy round differently.
    rtol = 2**-22 if name.startswith("KDPM2") else 0
    torch.testing.assert_close(ours.timesteps, plainly.timesteps, rtol=rtol, atol=0)
    if isinstance(getattr(plainly, "sigmas", None), Tensor):
        torch.testing.assert_close(ours.sigmas, plainly.sigmas, rtol=0, atol=0)
    got = trajectory(ours, dtype, config, **options)
    plain = trajectory(plainly, dtype, config, **options)
    module = type(exactly).__module__
    drawn = torch.float32 if name in FP32_NOISE else dtype

    def draw(shape: Any, generator: Any, device: Any, dtype: Any, low=drawn) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=low).to(dtype)

    monkeypatch.setattr(f"{module}.torch", _DoubleTorch())
    if hasattr(inspect.getmodule(type(exactly)), "randn_tensor"):
        monkeypatch.setattr(f"{module}.randn_tensor", draw)
    exact = trajectory(exactly, torch.float64, config, **options)
    assert exact.isfinite().all()
    assert_as_good_as_torch([got], [plain], [exact], dtype)


@pytest.mark.parametrize(("name", "config", "steps"), CASES)
def test_trajectory(name, config, steps, monkeypatch) -> None:
    compare(name, config, steps, torch.float32, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_low_precision(name, dtype, monkeypatch) -> None:
    """A default configuration: samples and history are rounded once a step."""
    config = {"clip_sample": False} if name in ("DDIM", "DDPM", "DDIMInverse") else {}
    compare(name, config, 7, dtype, monkeypatch)


@pytest.mark.parametrize("name", ["DDIM", "DDPM"])
@pytest.mark.parametrize("beta_schedule", BETAS)
def test_add_noise(name, beta_schedule) -> None:
    sample, noise = torch.randn(2, *SHAPE[1:]), torch.randn(2, *SHAPE[1:])
    timesteps = torch.tensor([0, 999])
    theirs = getattr(diffusers, f"{name}Scheduler")(beta_schedule=beta_schedule)
    ours = getattr(schedulers, f"{name}Scheduler")(beta_schedule=beta_schedule)
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


ADDING = sorted(set(CONFIGS) - {"DDIMInverse", "IPNDM"})


@pytest.mark.parametrize("name", ADDING)
def test_add_noise_agrees_on_scheduled_timesteps(name) -> None:
    if name == "LMSDiscrete":
        pytest.importorskip("scipy")
    theirs = getattr(diffusers, f"{name}Scheduler")()
    ours = getattr(schedulers, f"{name}Scheduler")()
    theirs.set_timesteps(10)
    timesteps = theirs.timesteps[[2, 8]]
    sample, noise = torch.randn(2, *SHAPE), torch.randn(2, *SHAPE)
    sample, noise = sample[:, 0], noise[:, 0]
    if name.startswith("FlowMatch"):
        if name.endswith("HeunDiscrete"):
            pytest.skip("diffusers takes the level of the step, not of the timestep")
        want = theirs.scale_noise(sample, timesteps, noise)
    else:
        want = theirs.add_noise(sample, noise, timesteps)
    got = ours.add_noise(sample, noise, timesteps)
    # Between timesteps of training theirs is interpolated, ours that of the nearest.
    loose = {"rtol": 2e-2, "atol": 2e-2} if want.abs().max() > 20 or "Discrete" in name else {}
    torch.testing.assert_close(got, want, **loose)


@pytest.mark.parametrize("name", CONFIGS)
def test_configuration_of_diffusers_folder_and_dict(name, tmp_path, caplog) -> None:
    if name == "LMSDiscrete":
        pytest.importorskip("scipy")
    theirs = getattr(diffusers, f"{name}Scheduler")()
    cls = getattr(schedulers, f"{name}Scheduler")
    theirs.save_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "pipeline" / "scheduler")
    for ours in (
        *map(cls.from_config, (tmp_path, tmp_path / "scheduler_config.json", theirs.config)),
        cls.from_pretrained(tmp_path),
        cls.from_pretrained(str(tmp_path / "scheduler_config.json")),
        cls.from_pretrained(tmp_path / "pipeline", subfolder="scheduler"),
    ):
        for key, value in theirs.config.items():
            if not key.startswith("_") and key != "tau_func":
                assert getattr(ours, key) == value, key
    assert cls.from_pretrained(tmp_path, num_train_timesteps=500).num_train_timesteps == 500
    assert not caplog.records
    ours.save_config(tmp_path / "ours")
    back = type(theirs).from_pretrained(tmp_path / "ours")
    for key, value in theirs.config.items():
        if not key.startswith("_"):
            assert back.config[key] == value, key
    parameters = set(inspect.signature(type(theirs)).parameters) - {"kwargs"}
    assert parameters <= set(inspect.signature(cls).parameters)


@pytest.mark.parametrize("return_dict", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_are_those_of_diffusers_where_they_are_asked_for(name, return_dict) -> None:
    if name == "LMSDiscrete":
        pytest.importorskip("scipy")
    sample = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))

    def step(module: Any) -> Any:
        scheduler = getattr(module, f"{name}Scheduler")()
        scheduler.set_timesteps(4)
        t, options = scheduler.timesteps[0], {"return_dict": return_dict}
        if "generator" in inspect.signature(scheduler.step).parameters:
            options["generator"] = torch.Generator().manual_seed(1)
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(sample, t)
        return scheduler.step(sample / 3, t, sample, **options)

    got, want = step(schedulers), step(diffusers)
    if return_dict:
        assert list(vars(got)) == [key for key, value in want.items() if value is not None]
        got, want = tuple(vars(got).values()), want.to_tuple()
    assert type(got) is tuple and len(got) == len(want)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_outputs_of_a_step_with_a_timestep_each() -> None:
    scheduler = schedulers.DDIMScheduler()
    scheduler.set_timesteps(4)
    sample, each = torch.randn(SHAPE), scheduler.timesteps[torch.arange(8) % 4]
    plain, x0 = scheduler.step(sample, each, sample, return_x0=True)
    assert isinstance(scheduler.step(sample, each, sample), Tensor)
    found = scheduler.step(sample, each, sample, return_dict=True)
    assert torch.equal(found.prev_sample, plain) and torch.equal(found.pred_original_sample, x0)
    assert torch.equal(scheduler.step(sample, each, sample, return_dict=False)[1], x0)
