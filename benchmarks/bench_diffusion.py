"""Sampling from diffusers' UNet2DModel and training it, stock, compiled and patched, in turns.

The configuration is that of google/ddpm-cifar10-32, with random weights. "patched" is the one line
`aigc_fast.patch(model)`; "patched_channels_last" and "patched_bfloat16" patch a model that torch's
own `.to` has moved to that layout or to both, which is the policy that pays on CPUs; "frozen" ones
are patched by `aigc_fast.patch(model, freeze=True)`, which keeps packed copies of weights.
"""

import copy
import time
from collections.abc import Callable

import pytest
import torch

import aigc_fast
from aigc_fast.schedulers import DDIMScheduler
from benchmarks.bench_autoregressive import medians
from benchmarks.machine import DEVICE

diffusers = pytest.importorskip("diffusers")

DDPM_CIFAR10 = dict(
    sample_size=32,
    block_out_channels=(128, 256, 256, 256),
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=2,
    attention_head_dim=None,
    downsample_padding=0,
    flip_sin_to_cos=False,
    freq_shift=1,
    norm_eps=1e-6,
)


def models(compiled: bool) -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    stock = diffusers.UNet2DModel(**DDPM_CIFAR10).eval().to(DEVICE)
    found = {
        "stock": stock,
        "stock_bfloat16": copy.deepcopy(stock).bfloat16(),
        "patched": copy.deepcopy(stock),
        "patched_channels_last": copy.deepcopy(stock).to(memory_format=torch.channels_last),
    }
    found["patched_bfloat16"] = copy.deepcopy(found["patched_channels_last"]).bfloat16()
    for name in ("channels_last", "bfloat16"):
        found[f"frozen_{name}"] = copy.deepcopy(found[f"patched_{name}"])
    for name, model in found.items():
        if name.startswith(("patched", "frozen")):
            aigc_fast.patch(model, freeze=name.startswith("frozen"))
    if compiled:
        found["compiled"] = torch.compile(copy.deepcopy(stock))
    return found


@torch.inference_mode()
def sample(model: torch.nn.Module, batch: int, steps: int) -> torch.Tensor:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(steps, DEVICE)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, 32, 32, generator=generator).to(DEVICE)
    dtype = next(model.parameters()).dtype
    for timestep in scheduler.timesteps.tolist():
        noise = model(x.to(dtype), timestep).sample
        x = scheduler.step(noise.float(), timestep, x)
    return x.cpu()  # waits for a GPU


def _check(found: dict[str, torch.nn.Module], batch: int) -> None:
    """No speed-up of a wrong result. One prediction is compared, not the samples: steps of a model
    without training carry roundings so far apart that stock bfloat16 is at half the norm from
    float32."""
    x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)

    @torch.inference_mode()
    def prediction(model: torch.nn.Module) -> torch.Tensor:
        return model(x.to(next(model.parameters()).dtype), 500).sample.float()

    exact = prediction(found["stock"])
    off = {n: ((prediction(m) - exact).norm() / exact.norm()).item() for n, m in found.items()}
    for name, error in off.items():
        assert error <= (2 * off["stock_bfloat16"] if "bfloat16" in name else 1e-4), (name, off)


def record(
    benchmark, found: dict, run: Callable[[torch.nn.Module], object], ours: str, rounds: int
) -> None:
    """Times run(model) of all models in turns, and notes the ratios to "stock" and to `ours`."""

    def seconds(model: torch.nn.Module) -> float:
        start = time.perf_counter()
        run(model)
        return time.perf_counter() - start

    times = medians({name: lambda m=model: seconds(m) for name, model in found.items()}, rounds)
    benchmark.extra_info.update(
        dtype="float32",
        threads=torch.get_num_threads(),
        seconds=times,
        stock_over={name: times["stock"] / value for name, value in times.items()},
        peers_over_ours={
            name.replace("_", " "): value / times[ours]
            for name, value in times.items()
            if name != ours
        },
    )


@pytest.mark.parametrize("batch", [1, 8])
def bench_diffusion_sampling(benchmark, request, batch) -> None:
    quick = request.config.getoption("--quick")
    steps, rounds = (2, 2) if quick else (20, 5)
    found = models(compiled=not quick)  # which takes a minute
    _check(found, batch)
    if not quick:
        start = time.perf_counter()
        sample(found["compiled"], batch, 1)
        benchmark.extra_info["compile_seconds"] = time.perf_counter() - start
    record(benchmark, found, lambda model: sample(model, batch, steps), "frozen_bfloat16", rounds)
    benchmark.pedantic(lambda: sample(found["patched"], batch, 1), rounds=1)


def bench_diffusion_training(benchmark, request) -> None:
    """A step without the optimizer, float32, eight images: the loss and all gradients."""
    quick = request.config.getoption("--quick")
    found = {n: m for n, m in models(compiled=False).items() if n in ("stock", "patched")}
    x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def step(model: torch.nn.Module) -> list[torch.Tensor]:
        model.zero_grad()
        (model(x, 500).sample - x).square().mean().backward()
        return [p.grad for p in model.parameters()]

    pairs = list(zip(*map(step, found.values()), strict=True))
    norm, off = (
        torch.stack([g.norm() for g in grads]).norm()
        for grads in ([stock for stock, _ in pairs], [stock - patched for stock, patched in pairs])
    )
    assert off < 1e-4 * norm, off / norm
    record(benchmark, found, step, "patched", 1 if quick else 7)
    benchmark.pedantic(lambda: step(found["patched"]), rounds=1)
