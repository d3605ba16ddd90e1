"""step() of diffusers' own schedulers, with aigc_fast.integrations.diffusers installed and without.

Loops over one schedule, from the same noise; a stochastic solver draws its noise with torch in
both, and `noise` is what that alone takes. The rows are made in the first loop, which is not timed.
"""

import inspect
import logging

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aigc_fast._timing import interleaved
from benchmarks.machine import DEVICE

STEPS = 20
SHAPES = [(1, 4, 64, 64), (2, 16, 128, 128)]
CONFIGS = {
    "DDPM": {},
    "DDIM": {},
    "DDIM eta 1": {"eta": 1.0},
    "DDIMInverse": {},
    "PNDM": {"skip_prk_steps": True},
    "LCM": {},
    "TCD": {},
    "CMStochasticIterative": {},
    "EulerDiscrete": {},
    "EulerAncestralDiscrete": {},
    "EDMEuler": {},
    "HeunDiscrete": {},
    "KDPM2Discrete": {},
    "KDPM2AncestralDiscrete": {},
    "LMSDiscrete": {},
    "IPNDM": {},
    "DPMSolverMultistep": {},
    "DPMSolverMultistep 3": {"solver_order": 3},
    "DPMSolverMultistep SDE": {"algorithm_type": "sde-dpmsolver++"},
    "DPMSolverSinglestep": {},
    "EDMDPMSolverMultistep": {},
    "DEISMultistep": {},
    "UniPCMultistep": {},
    "UniPCMultistep 3": {"solver_order": 3},
    "SASolver": {},
    "FlowMatchEulerDiscrete": {},
    "FlowMatchHeunDiscrete": {},
    "FlowMatchLCM": {},
}


class Draws(TorchDispatchMode):
    """Counts the calls of randn."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "randn" in func.name()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def bench_step_through_install(benchmark, request, name, shape) -> None:
    diffusers = pytest.importorskip("diffusers")
    if name == "LMSDiscrete":
        pytest.importorskip("scipy")
    from aigc_fast.integrations import diffusers as integration

    logging.getLogger("diffusers").setLevel(logging.ERROR)
    config = dict(CONFIGS[name])
    options = {"eta": config.pop("eta")} if "eta" in config else {}
    cls = getattr(diffusers, f"{name.split()[0]}Scheduler")
    sample = torch.randn(shape, device=DEVICE)
    outputs = [torch.randn(shape, device=DEVICE) for _ in range(4)]
    generator = torch.Generator(DEVICE)
    if "generator" in inspect.signature(cls.step).parameters:
        options["generator"] = generator

    def loop(step):
        scheduler = cls(**config)
        scheduler.set_timesteps(STEPS)
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(sample, scheduler.timesteps[0])
        begin = dict(vars(scheduler))
        timesteps = list(scheduler.timesteps)

        def run():
            for key, value in begin.items():  # as set_timesteps leaves it
                vars(scheduler)[key] = list(value) if isinstance(value, list) else value
            generator.manual_seed(0)
            x = sample
            for i, t in enumerate(timesteps):
                x = step(scheduler, outputs[i % 4], t, x, return_dict=False, **options)[0]
            return x

        return run, len(timesteps)

    def draw():
        for _ in range(draws):
            torch.randn(shape, generator=generator, device=DEVICE)

    stock, count = loop(cls.step)
    integration.install()
    try:
        fused, _ = loop(cls.step)
    finally:
        integration.uninstall()
    with torch.no_grad():
        want, got = stock(), fused()
        assert (want - got).abs().max() <= 1e-3 * want.abs().max()
        seconds = 0.3 if request.config.getoption("--quick") else 2
        with Draws() as recorder:
            fused()
        draws = recorder.count
        variants = {"diffusers": stock, "installed": fused, **({"noise": draw} if draws else {})}
        times = interleaved(variants, seconds=seconds)
        benchmark.extra_info.update(
            dtype="float32",
            threads=torch.get_num_threads(),
            seconds={key: value / count for key, value in times.items()},
            diffusers_over_installed=times["diffusers"] / times["installed"],
            without_noise=(times["diffusers"] - times.get("noise", 0.0))
            / (times["installed"] - times.get("noise", 0.0)),
        )
        benchmark.pedantic(fused, rounds=3, warmup_rounds=1)
