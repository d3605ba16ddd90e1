"""sample(): seeds, labels, guidance, what is called on the way."""

import pytest
import torch
from torch import nn

from aigc_fast import schedulers
from aigc_fast.models.diffusion import Sampler, sample
from aigc_fast.schedulers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

IMAGE = torch.linspace(-0.5, 0.5, 16, dtype=torch.float64).view(1, 1, 4, 4)


class FlowOracle(nn.Module):
    """Knows the image of each class, and answers with noise - image."""

    def __init__(self):
        super().__init__()
        self.scales = nn.Parameter(torch.arange(3, dtype=torch.float64))

    def forward(self, sample, timesteps, labels=None):
        x0 = IMAGE if labels is None else self.scales[labels].view(-1, 1, 1, 1) * IMAGE
        return (sample - x0) / (timesteps.double() / 1000).view(-1, 1, 1, 1)


class Blur(nn.Module):
    """A model like any other: its answer depends on the sample, time and class."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, sample, timesteps, labels=None):
        shift = 0 if labels is None else labels.view(-1, 1, 1, 1)
        return self.weight * (sample.sin() + timesteps.view(-1, 1, 1, 1) / 1000 - shift)


def test_flow_euler_finds_what_the_model_knows():
    labels = torch.tensor([0, 1, 2])
    options = {"labels": labels, "null_label": 0, "num_steps": 6, "guidance_scale": 2.0}
    found = sample(FlowOracle(), FlowMatchEulerDiscreteScheduler(), (3, 1, 4, 4), **options)
    assert found.dtype == torch.float64
    expected = 2 * labels.view(-1, 1, 1, 1) * IMAGE
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler])
def test_a_seed_gives_the_same_samples(scheduler):
    def run(seed, count=2):
        return sample(Blur(), scheduler(), (count, 1, 4, 4), num_steps=4, seed=seed)

    assert run(3).equal(run(3)) and not run(3).equal(run(4))
    both = run([5, 7])
    torch.testing.assert_close(both[1:], run([7], 1), rtol=0, atol=0)
    torch.testing.assert_close(both[:1], run(5, 1), rtol=0, atol=0)


def test_every_step_is_shown():
    seen = []
    result = sample(
        Blur(), DDIMScheduler(), (2, 1, 4, 4), num_steps=3, on_step=lambda *step: seen.append(step)
    )
    assert [number for number, _, _ in seen] == [1, 2, 3]
    assert seen[-1][1] is result and not seen[0][1].equal(result)
    torch.testing.assert_close(seen[-1][2], result)


def test_without_guidance_the_model_is_asked_once():
    model, sizes = Blur(), []
    model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    labels = torch.tensor([0, 1])
    for scale in (1.0, 3.0):
        options = {"labels": labels, "null_label": 2, "num_steps": 1, "guidance_scale": scale}
        sample(model, DDIMScheduler(), (2, 1, 4, 4), **options)
    assert sizes == [2, 4]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"labels": torch.tensor([1])}, "labels must be 2, one for each sample, got 1"),
        ({"seed": [1, 2, 3]}, "seed must be 2"),
        ({"guidance_scale": 2.0}, "guidance_scale 2.0 needs labels and null_label"),
        ({"guidance_scale": 2.0, "null_label": 3}, "needs labels and null_label"),
        ({"num_steps": 0}, "num_inference_steps must be in"),
    ],
)
def test_refusals(options, match):
    with pytest.raises(ValueError, match=match):
        sample(Blur(), schedulers.DDIMScheduler(), (2, 1, 4, 4), **options)


def test_what_is_of_diffusers_is_told_what_to_use():
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler()
    message = r"scheduler must be one of aigc_fast.schedulers, got DDIMScheduler of diffusers"
    for call in (lambda: sample(Blur(), theirs, (1, 1, 4, 4)), lambda: Sampler(Blur(), theirs)):
        with pytest.raises(TypeError, match=message):
            call()
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
    )
    with pytest.raises(TypeError, match="model must return a tensor, got UNet2DOutput"):
        sample(unet, DDIMScheduler.from_config(theirs.config), (1, 1, 8, 8), num_steps=2)
