"""diffusers' own schedulers, with aigc_fast.integrations.diffusers installed and without; `exact`
is install(exact=True), whose results are compared to the bit.

Loops from the same noise: over one schedule, for the time of step(), and with set_timesteps. A
stochastic solver draws its noise with torch in both, and `noise` is what that alone takes.
"""

import inspect
import logging
from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aigc_fast._timing import interleaved
from aigc_fast.schedulers import tables
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


class Calls:
    """What a loop of a diffusers scheduler needs: class, arguments, tensors."""

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        diffusers = pytest.importorskip("diffusers")
        if name == "LMSDiscrete":
            pytest.importorskip("scipy")
        logging.getLogger("diffusers").setLevel(logging.ERROR)
        config = dict(CONFIGS[name])
        self.options = {"eta": config.pop("eta")} if "eta" in config else {}
        self.cls = getattr(diffusers, f"{name.split()[0]}Scheduler")
        self.scheduler = self.cls(**config)
        self.sample = torch.randn(shape, device=DEVICE)
        self.outputs = [torch.randn(shape, device=DEVICE) for _ in range(4)]
        self.generator = torch.Generator(DEVICE)
        if "generator" in inspect.signature(self.cls.step).parameters:
            self.options["generator"] = self.generator

    def lay_out(self, steps: int) -> None:
        self.scheduler.set_timesteps(steps)
        if hasattr(self.scheduler, "scale_model_input"):
            self.scheduler.scale_model_input(self.sample, self.scheduler.timesteps[0])

    def run(self, step: Callable) -> torch.Tensor:
        self.generator.manual_seed(0)
        x = self.sample
        for i, t in enumerate(self.scheduler.timesteps):
            x = step(
                self.scheduler, self.outputs[i % 4], t, x, return_dict=False, **self.options
            )[0]  # fmt: skip
        return x

    def steps(self) -> dict[str, Callable]:
        """The class's own step, that of install(), and the exact one."""
        from aigc_fast.integrations import diffusers as integration

        steps = {"diffusers": self.cls.step}
        try:
            for name, exact in (("installed", False), ("exact", True)):
                integration.install(exact=exact)
                steps[name] = self.cls.step
        finally:
            integration.uninstall()
        return steps

    def measure(self, benchmark, request, loops: dict[str, Callable], count: int) -> None:
        """Of `loops` without noise, once they are found to agree; seconds of one of `count`."""
        with torch.no_grad():
            want, got = loops["diffusers"](), loops["installed"]()
            assert (want - got).abs().max() <= 1e-3 * want.abs().max()
            for _ in range(2):  # watched, and replayed
                assert torch.equal(loops["exact"](), want)
            with Draws() as recorder:
                loops["installed"]()
            draws = recorder.count

            def draw() -> None:
                for _ in range(draws):
                    torch.randn(self.sample.shape, generator=self.generator, device=DEVICE)

            seconds = 0.3 if request.config.getoption("--quick") else 2
            times = interleaved({**loops, **({"noise": draw} if draws else {})}, seconds=seconds)
            noise = times.get("noise", 0.0)
            benchmark.extra_info.update(
                dtype="float32",
                threads=torch.get_num_threads(),
                seconds={key: value / count for key, value in times.items()},
                diffusers_over_installed=times["diffusers"] / times["installed"],
                without_noise=(times["diffusers"] - noise) / (times["installed"] - noise),
                diffusers_over_exact=times["diffusers"] / times["exact"],
                exact_without_noise=(times["diffusers"] - noise) / (times["exact"] - noise),
            )
            if "first" in times:
                benchmark.extra_info["diffusers_over_first"] = times["diffusers"] / times["first"]
            benchmark.pedantic(loops["installed"], rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def bench_step_through_install(benchmark, request, name, shape) -> None:
    """Seconds of a step."""
    calls = Calls(name, shape)
    calls.lay_out(STEPS)
    begin, scheduler = dict(vars(calls.scheduler)), vars(calls.scheduler)

    def again(step: Callable) -> Callable:
        def run() -> torch.Tensor:
            for key, value in begin.items():  # as set_timesteps leaves it
                scheduler[key] = list(value) if isinstance(value, list) else value
            return calls.run(step)

        return run

    loops = {name: again(step) for name, step in calls.steps().items()}
    calls.measure(benchmark, request, loops, len(calls.scheduler.timesteps))


@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("name", CONFIGS)
def bench_loop_through_install(benchmark, request, name, steps) -> None:
    """Seconds of a loop with set_timesteps before it; `first` makes the rows, the others find them.

    Of two stages a step asks the model twice, and is two calls.
    """
    calls = Calls(name, SHAPES[0])
    steps_of = calls.steps()

    def whole(step: Callable) -> Callable:
        def run() -> torch.Tensor:
            calls.lay_out(steps)
            return calls.run(step)

        return run

    def first() -> torch.Tensor:
        tables._made.cache_clear()
        return whole(steps_of["installed"])()

    loops = {name: whole(step) for name, step in steps_of.items()} | {"first": first}
    calls.measure(benchmark, request, loops, 1)
