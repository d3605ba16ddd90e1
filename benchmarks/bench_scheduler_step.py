"""scheduler_step beside eager PyTorch, and whole schedulers beside diffusers'."""

import dataclasses

import pytest
import torch

from aigc_fast import schedulers
from aigc_fast._timing import interleaved
from benchmarks.machine import DEVICE
from tests.op_samples import OPS

OP = OPS["scheduler_step"]
FLOATS = (torch.float32, torch.float64)


def eager(
    sample, model_output, coefficients, *, noise=None, history=(), uncond_output=None,
    guidance_scale=1.0, guidance_rescale=0.0, return_x0=False,
):  # fmt: skip
    a, b, r, *rest = coefficients
    m = model_output
    if uncond_output is not None:
        m = uncond_output + guidance_scale * (model_output - uncond_output)
    if guidance_rescale:
        dims = tuple(range(1, m.dim()))
        ratio = model_output.std(dims, keepdim=True) / m.std(dims, keepdim=True)
        m = m * (guidance_rescale * ratio + 1 - guidance_rescale)
    x0 = (a * sample + b * m).clamp(-r, r)

    def combine(p, q, s, n, *h):
        y = p * x0 + q * sample + s * m
        if noise is not None:
            y = y + n * noise
        for weight, earlier in zip(h, history, strict=True):
            y = y + weight * earlier
        return y

    terms = 4 + len(history)
    results = [combine(*rest[:terms])]
    if return_x0:
        results.append(x0)
    if len(rest) > terms:
        results.append(combine(*rest[terms:]))
    return tuple(results) if len(results) > 1 else results[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", OP.large(), ids=lambda s: s.name)
def bench_scheduler_step(measure, sample, dtype) -> None:
    measure(_with_tensor(sample), sample, dtype, eager=eager, limit="add")


def _with_tensor(sample):
    """The operator with the sample's row made a tensor once, as schedulers do; eager PyTorch is
    faster with the floats themselves."""
    rows = {d: torch.tensor(sample.args[2], dtype=d, device=DEVICE) for d in FLOATS}

    def step(x, model_output, row, **kwargs):
        row = rows[torch.float64 if x.dtype == torch.float64 else torch.float32]
        return OP.function(x, model_output, row, **kwargs)

    return dataclasses.replace(OP, function=step)


@pytest.mark.parametrize("name", ["DDIM", "DDPM", "DPMSolverMultistep"])
def bench_scheduler(benchmark, request, name) -> None:
    """Twenty steps from the same noise; a stochastic solver draws its own in both."""
    diffusers = pytest.importorskip("diffusers")
    shape, steps = (1, 4, 64, 64), 20
    theirs = getattr(diffusers, f"{name}Scheduler")()
    ours = getattr(schedulers, f"{name}Scheduler")()
    start = torch.randn(shape, device=DEVICE)
    outputs = [torch.randn(shape, device=DEVICE) for _ in range(steps)]
    theirs.set_timesteps(steps)
    ours.set_timesteps(steps, DEVICE)
    timesteps = theirs.timesteps.tolist()
    assert timesteps == ours.timesteps.tolist()

    def run_theirs():
        theirs._step_index, theirs.lower_order_nums = None, 0
        sample = start
        for timestep, output in zip(timesteps, outputs, strict=True):
            sample = theirs.step(output, timestep, sample).prev_sample
        return sample

    def run_ours():
        ours.set_begin_index(0)
        sample = start
        for timestep, output in zip(timesteps, outputs, strict=True):
            sample = ours.step(output, timestep, sample)
        return sample

    with torch.no_grad():
        torch.manual_seed(0)
        expected = run_theirs()
        torch.manual_seed(0)
        # fp32 steps that round elsewhere: the trajectories stay together to 1e-4 of their size.
        assert (run_ours() - expected).abs().max() <= 1e-4 * expected.abs().max()
        quick = request.config.getoption("--quick")
        times = interleaved(
            {"diffusers": run_theirs, "ours": run_ours}, seconds=0.5 if quick else 3
        )
        benchmark.extra_info.update(
            dtype="float32",
            threads=torch.get_num_threads(),
            seconds={key: value / steps for key, value in times.items()},
            diffusers_over_ours=times["diffusers"] / times["ours"],
        )
        benchmark.pedantic(run_ours, rounds=5, warmup_rounds=1)
