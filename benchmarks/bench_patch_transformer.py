"""aigc_fast.patch on diffusers' transformers: a few layers of the real widths, stock and patched.

In turns, with random weights. Images have 512 pixels a side (DiT's 256), the video five latent
frames.
"""

import copy
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import aigc_fast
from benchmarks.bench_diffusion import record
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
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def bench_patch_transformer(benchmark, request, name, dtype) -> None:
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
