"""A call of diffusers' denoising models, stock and patched in turns, with random weights.

Of transformers a few layers of the real widths: images have 512 pixels a side (DiT's 256), the
video five latent frames. The U-Net of Stable Diffusion 1.5 is whole, two images of 256 pixels; in
float16, of which torch has no products on many CPUs, one of DDPM takes its place.
"""

import copy
import itertools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import aigc_fast
from benchmarks.bench_diffusion import DDPM_CIFAR10, record
from benchmarks.machine import DEVICE

diffusers = pytest.importorskip("diffusers")


class Case(NamedTuple):
    """A class of diffusers, its arguments, and the shapes of what a call takes."""

    cls: str
    options: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    others: dict[str, Tensor]


TIMESTEP = dict(timestep=torch.tensor([500]))
PATCHES = torch.cartesian_prod(*map(torch.arange, (1, 32, 32))).float()
CASES = {
    "dit": Case(  # XL/2
        "DiTTransformer2DModel",
        dict(
            num_attention_heads=16,
            attention_head_dim=72,
            in_channels=4,
            out_channels=8,
            num_layers=7,
            sample_size=32,
            num_embeds_ada_norm=1000,
        ),
        dict(hidden_states=(2, 4, 32, 32)),
        dict(timestep=torch.tensor([500, 500]), class_labels=torch.tensor([1, 2])),
    ),
    "sd3": Case(  # medium
        "SD3Transformer2DModel",
        dict(
            sample_size=64,
            num_layers=3,
            num_attention_heads=24,
            attention_head_dim=64,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            out_channels=16,
        ),
        dict(
            hidden_states=(1, 16, 64, 64),
            encoder_hidden_states=(1, 333, 4096),
            pooled_projections=(1, 2048),
        ),
        TIMESTEP,
    ),
    "flux": Case(  # dev
        "FluxTransformer2DModel",
        dict(num_layers=1, num_single_layers=1, guidance_embeds=True),
        dict(
            hidden_states=(1, 1024, 64),
            encoder_hidden_states=(1, 256, 4096),
            pooled_projections=(1, 768),
        ),
        dict(
            timestep=torch.tensor([0.5]),
            guidance=torch.tensor([3.5]),
            img_ids=PATCHES,
            txt_ids=torch.zeros(256, 3),
        ),
    ),
    "wan": Case(  # 1.3B
        "WanTransformer3DModel",
        dict(num_attention_heads=12, attention_head_dim=128, num_layers=2, ffn_dim=8960),
        dict(hidden_states=(1, 16, 5, 30, 52), encoder_hidden_states=(1, 512, 4096)),
        TIMESTEP,
    ),
    "sd15": Case(
        "UNet2DConditionModel",
        dict(sample_size=64, cross_attention_dim=768),
        dict(sample=(2, 4, 32, 32), encoder_hidden_states=(2, 77, 768)),
        TIMESTEP,
    ),
    "ddpm": Case("UNet2DModel", DDPM_CIFAR10, dict(sample=(1, 3, 32, 32)), TIMESTEP),
}
CALLS = [
    *itertools.product(["dit", "sd3", "flux", "wan", "sd15"], [torch.float32, torch.bfloat16]),
    ("ddpm", torch.float16),
]


@pytest.mark.parametrize(("name", "dtype"), CALLS, ids=str)
def bench_patch_denoiser(benchmark, request, name, dtype) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    exact = getattr(diffusers, case.cls)(**case.options).eval().to(DEVICE)
    stock = copy.deepcopy(exact).to(dtype)
    found = {"stock": stock, "patched": copy.deepcopy(stock)}
    aigc_fast.patch(found["patched"])
    generator = torch.Generator().manual_seed(0)
    inputs = {key: torch.randn(shape, generator=generator) for key, shape in case.shapes.items()}
    others = {key: x.to(DEVICE) for key, x in case.others.items()}

    @torch.inference_mode()
    def predict(model: torch.nn.Module) -> Tensor:
        given = {key: x.to(DEVICE, model.dtype) for key, x in inputs.items()}
        return model(**given, **others).sample.float().cpu()  # waits for a GPU

    want = predict(exact)
    off = {n: ((predict(m) - want).norm() / want.norm()).item() for n, m in found.items()}
    limit = 1e-4 if dtype is torch.float32 else 2 * off["stock"]
    assert off["patched"] <= limit, off  # no speed-up of a wrong result
    record(benchmark, found, predict, "patched", 1 if request.config.getoption("--quick") else 7)
    benchmark.extra_info["dtype"] = str(dtype).removeprefix("torch.")
    benchmark.pedantic(lambda: predict(found["patched"]), rounds=1)
