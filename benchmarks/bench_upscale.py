"""Real-ESRGAN's generators on a photograph: as a user would write them in PyTorch, the same under
torch.compile, and ours, in turns. `psnr` is against float32; no figure is given below 50 dB for
float32 and for what `aigc-fast upscale` chooses. Of the other dtype, `psnr` says what it costs.

Patterns finer than pixels are no measure: a generator adds several times more to them than to a
photograph, and bfloat16 rounds what it adds (40 to 50 dB)."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from aigc_fast._timing import interleaved
from aigc_fast.io import find_realesrgan
from aigc_fast.models.gan import load_generator
from aigc_fast.models.gan.upscale import choose_dtype
from benchmarks.machine import DEVICE
from tests.models.test_upscalers import plain_compact, plain_rrdb

MODELS = {"realesr-animevideov3-x2": 256, "realesr-animevideov3-x4": 256, "realesrgan-x4plus": 64}


def photograph(size: int) -> torch.Tensor:
    """The middle of scikit-image's cat; the package is found, not imported."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        pytest.skip("needs the photographs of scikit-image: pip install --no-deps scikit-image")
    with Image.open(Path(spec.origin).parent / "data" / "chelsea.png") as file:
        left, top = (file.width - size) // 2, (file.height - size) // 2
        cat = np.asarray(file.convert("RGB").crop((left, top, left + size, top + size)))
    return torch.from_numpy(cat.copy()).permute(2, 0, 1)[None].to(DEVICE) / 255


class Plain(nn.Module):
    """The published network, contiguous."""

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.state = {name: value.to(DEVICE, dtype) for name, value in model.state_dict().items()}
        self.sizes = getattr(model, "upscale", None), model.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.sizes[0] is None:
            return plain_rrdb(self.state, x)
        return plain_compact(self.state, x, *self.sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def bench_upscale(benchmark, quick, name, dtype) -> None:
    model = load_generator(find_realesrgan(name))
    plain, plain_in_dtype = Plain(model), Plain(model, dtype)
    x = photograph(MODELS[name] // 2 if quick else MODELS[name])
    model = model.to(DEVICE, dtype)
    mine = lambda: model(x.to(dtype)).float()  # noqa: E731
    exact = plain(x)
    psnr, theirs = (
        -10 * (y - exact).square().mean().log10().item()
        for y in (mine(), plain_in_dtype(x.to(dtype)).float())
    )
    if dtype in (torch.float32, choose_dtype(model, DEVICE)):
        assert psnr > 50
    variants = {"eager": lambda: plain(x), "ours": mine}
    if not quick:
        compiled = torch.compile(plain)
        variants["compile"] = lambda: compiled(x)
    times = interleaved(variants, seconds=1.0 if quick else 10.0, rounds=1 if quick else 3)
    benchmark.extra_info.update(
        psnr=psnr,
        plain_psnr=min(theirs, 200.0),  # in float32 it is the measure itself
        threads=torch.get_num_threads(),
        seconds=times,
        peers_over_ours={n: t / times["ours"] for n, t in times.items() if n != "ours"},
    )
    benchmark.pedantic(mine, rounds=1 if quick else 3)
