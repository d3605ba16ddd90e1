"""The convolution of video autoencoders beside torch's of a padded copy, and a whole decoder."""

import copy

import pytest
import torch
import torch.nn.functional as F

import aigc_fast
from aigc_fast import ops
from benchmarks.bench_diffusion import record
from benchmarks.machine import DEVICE
from tests.op_samples.sample import OpSamples, Sample, rand


def ours(x, weight, bias):
    return ops.causal_conv3d(x, weight, bias, padding=1)


def torchs(x, weight, bias):
    return F.conv3d(F.pad(x, (1, 1, 1, 1, 2, 0)), weight, bias)


def layer(channels: int, frames: int, size: int) -> Sample:
    weight = rand(channels, channels, 3, 3, 3, seed=1, scale=(27 * channels) ** -0.5)
    x = rand(1, channels, frames, size, size)
    return Sample(f"1x{channels}x{frames}x{size}x{size}", (x, weight, rand(channels, seed=2)))


OP = OpSamples(ours, samples=list, refusals=list)


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", [layer(96, 1, 64), layer(192, 8, 32)], ids=lambda s: s.name)
def bench_causal_conv3d(measure, sample, dtype, direction) -> None:
    measure(OP, sample, dtype, eager=torchs, backward=direction != "forward")


def bench_video_decode(benchmark, request) -> None:
    """Five frames of 64 x 64 from diffusers' AutoencoderKLWan, random weights."""
    diffusers = pytest.importorskip("diffusers")
    quick = request.config.getoption("--quick")
    torch.manual_seed(0)
    stock = diffusers.AutoencoderKLWan(base_dim=32 if quick else 96).eval().to(DEVICE)
    found = {"stock": stock, "patched": copy.deepcopy(stock)}
    found["stock_bfloat16"] = copy.deepcopy(stock).bfloat16()
    found["patched_bfloat16"] = copy.deepcopy(found["stock_bfloat16"])
    for name, model in found.items():
        if name.startswith("patched"):
            aigc_fast.patch(model)
    latents = torch.randn(1, 16, 2, 8, 8, device=DEVICE)

    @torch.inference_mode()
    def decode(model: torch.nn.Module) -> torch.Tensor:
        dtype = next(model.parameters()).dtype
        return model.decode(latents.to(dtype)).sample.float().cpu()  # waits for a GPU

    exact = decode(stock)
    off = {n: ((decode(m) - exact).norm() / exact.norm()).item() for n, m in found.items()}
    for name, error in off.items():
        assert error <= (2 * off["stock_bfloat16"] if "bfloat16" in name else 1e-4), (name, off)
    record(benchmark, found, decode, "patched", 1 if quick else 7)
    benchmark.pedantic(lambda: decode(found["patched"]), rounds=1)
