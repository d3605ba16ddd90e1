"""Models and schedulers under a default device that is not theirs. "meta" stands for a GPU: of what
is made there by mistake nothing can be read."""

import subprocess
import sys

import pytest
import torch

from aigc_fast.models.autoregressive import Sampling, generate
from aigc_fast.models.vae import AutoencoderKL
from tests.models.test_decoder_lm import random_model
from tests.schedulers.test_scheduler import ALL


@pytest.fixture
def elsewhere():
    with torch.device("meta"):
        yield


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.8, seed=3, repetition_penalty=1.2)], ids=repr
)
def test_generate(elsewhere, sampling) -> None:
    def tokens() -> list[list[int]]:
        return [r.tokens for r in generate(model, [[1, 2, 3], [4]], 6, sampling=sampling)]

    with torch.device("cpu"):
        model = random_model()  # which has made no rotations so far
    found = tokens()
    with torch.device("cpu"):
        assert tokens() == found
        generate(model, [[1]], 2, sampling=Sampling(temperature=1.0))
    assert len(generate(model, [[1]], 2, sampling=Sampling(temperature=1.0))[0].tokens) == 2


@pytest.mark.parametrize("cls", ALL)
def test_schedules(elsewhere, cls) -> None:
    with torch.device("cpu"):
        want, x = cls(), torch.randn(2, 3, 4, 4)
        want.set_timesteps(5)
    found = cls()
    found.set_timesteps(5)
    assert found.timesteps.equal(want.timesteps)
    for timestep in found.timesteps[:3]:
        x = found.step(x, timestep, x)
        assert x.device.type == "cpu" and x.isfinite().all()


@torch.no_grad()
def test_tiles(elsewhere) -> None:
    with torch.device("cpu"):
        model = AutoencoderKL(dict(block_out_channels=(32,), layers_per_block=1)).eval()
        latents = torch.randn(1, 4, 9, 4)
        want = model.decode(latents, tile=4)
    assert model.decode(latents, tile=4).equal(want)


def test_the_library_is_imported_there() -> None:
    code = """
import torch
torch.set_default_device("meta")
from aigc_fast import ops
x, alpha = torch.ones(1, 2, 8, device="cpu"), torch.ones(2, device="cpu")
assert ops.alias_free_snake(x, alpha, alpha).device.type == "cpu"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
