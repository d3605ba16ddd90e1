"""Real-ESRGAN's generators on a picture: as a user would write them in PyTorch, the same under
torch.compile, and ours, in turns. `psnr` is against float32; no figure is given below 50 dB."""

import pytest
import torch
from torch import nn

from aigc_fast._timing import interleaved
from aigc_fast.io import find_realesrgan
from aigc_fast.models.gan import load_generator
from benchmarks.machine import DEVICE
from tests.models.test_upscalers import plain_compact, plain_rrdb

MODELS = {"realesr-animevideov3-x2": 256, "realesr-animevideov3-x4": 256, "realesrgan-x4plus": 64}


def picture(size: int) -> torch.Tensor:
    """Waves of all lengths."""
    at = torch.linspace(0, 1, size)
    waves = [torch.sin(40 * (i + 1) * at[:, None] * (at + 0.3)) for i in range(3)]
    return (torch.stack(waves)[None] / 2 + 0.5).to(DEVICE)


class Plain(nn.Module):
    """The published network, float32, contiguous."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.state = {name: value.to(DEVICE) for name, value in model.state_dict().items()}
        self.sizes = getattr(model, "upscale", None), model.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.sizes[0] is None:
            return plain_rrdb(self.state, x)
        return plain_compact(self.state, x, *self.sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def bench_upscale(benchmark, request, name, dtype) -> None:
    model = load_generator(find_realesrgan(name))
    plain, x = Plain(model), picture(MODELS[name])
    model = model.to(DEVICE, dtype)
    compiled, mine = torch.compile(plain), lambda: model(x.to(dtype)).float()
    psnr = -10 * (mine() - plain(x)).square().mean().log10().item()
    assert psnr > 50
    variants = {"eager": lambda: plain(x), "compile": lambda: compiled(x), "ours": mine}
    seconds = 2.0 if request.config.getoption("--quick") else 10.0
    times = interleaved(variants, seconds=seconds, rounds=3)
    benchmark.extra_info.update(
        psnr=psnr,
        threads=torch.get_num_threads(),
        seconds=times,
        peers_over_ours={n: t / times["ours"] for n, t in times.items() if n != "ours"},
    )
    benchmark.pedantic(mine, rounds=3)
