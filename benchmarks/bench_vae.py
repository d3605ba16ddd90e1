"""Decoding latents with diffusers' AutoencoderKL, stock, compiled and patched, and with ours.

The configuration is that of Stable Diffusion 1, 2 and XL, with random weights; `--quick` takes a
narrower one. "ours_bfloat16" is in channels_last, as is "patched_bfloat16": the policy that pays on
CPUs.
"""

import copy

import pytest
import torch

import aigc_fast
from aigc_fast.models.vae import AutoencoderKL
from benchmarks.bench_diffusion import record
from benchmarks.machine import DEVICE

diffusers = pytest.importorskip("diffusers")


def config(widths: tuple[int, ...]) -> dict:
    return dict(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=2,
    )


STABLE_DIFFUSION = config((128, 256, 512, 512))
QUICK = config((32, 64, 64))


def models(options: dict, compiled: bool) -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    stock = diffusers.AutoencoderKL(**options).eval().to(DEVICE)
    stock.encoder = torch.nn.Identity()  # only decoding is timed

    def bfloat16(model: torch.nn.Module) -> torch.nn.Module:
        return copy.deepcopy(model).to(torch.bfloat16, memory_format=torch.channels_last)

    ours = AutoencoderKL(options).eval()
    ours.encoder = torch.nn.Identity()
    ours.to(DEVICE).load_state_dict(stock.state_dict())
    found = {
        "stock": stock,
        "stock_bfloat16": bfloat16(stock),
        "patched": copy.deepcopy(stock),
        "patched_bfloat16": bfloat16(stock),
        "ours": ours,
        "ours_bfloat16": bfloat16(ours),
    }
    aigc_fast.patch(found["patched"])
    aigc_fast.patch(found["patched_bfloat16"])
    if compiled:
        found["compiled"] = copy.deepcopy(stock)
        found["compiled"].decoder = torch.compile(found["compiled"].decoder)
    return found


@torch.inference_mode()
def decode(model: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
    images = model.decode(latents.to(next(model.parameters()).dtype))
    return (images if isinstance(images, torch.Tensor) else images.sample).float().cpu()


def _check(found: dict[str, torch.nn.Module], latents: torch.Tensor) -> None:
    """No speed-up of a wrong result."""
    images = {name: decode(model, latents) for name, model in found.items()}
    exact = images["stock"]
    off = {n: ((image - exact).norm() / exact.norm()).item() for n, image in images.items()}
    for name, error in off.items():
        assert error <= (2 * off["stock_bfloat16"] if "bfloat16" in name else 1e-4), (name, off)


@pytest.mark.parametrize("side", [32])
def bench_vae_decode(benchmark, request, side) -> None:
    quick = request.config.getoption("--quick")
    options, rounds = (QUICK, 2) if quick else (STABLE_DIFFUSION, 5)
    found = models(options, compiled=not quick)
    latents = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    _check(found, latents)  # compiles, too

    record(benchmark, found, lambda model: decode(model, latents), "ours_bfloat16", rounds)
    benchmark.pedantic(lambda: decode(found["ours"], latents), rounds=1)
