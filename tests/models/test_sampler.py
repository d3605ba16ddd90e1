"""Sampler: the samples of sample(), with the loop recorded once."""

import pytest
import torch

from aigc_fast import schedulers
from aigc_fast.models.diffusion import Sampler, SmallUNet, sample
from aigc_fast.schedulers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from tests.models.test_diffusion_sampling import Blur
from tests.tape import TapeRecorder, tapes

GUIDED = {"guidance_scale": 3.0, "null_label": 2, "guidance_rescale": 0.5}
SOLVERS = {
    name: getattr(schedulers, name) for name in schedulers.__all__ if name.endswith("Scheduler")
}
del SOLVERS["Scheduler"]
SOLVERS |= {
    "thresholding": lambda: DDIMScheduler(thresholding=True),
    "eta": lambda: DDIMScheduler(eta=1.0),
    "sde": lambda: DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    "learned": lambda: DDPMScheduler(variance_type="learned_range"),
}


class BlurAndVariance(Blur):
    def forward(self, sample, timesteps, labels=None):
        mean = super().forward(sample, timesteps, labels)
        return torch.cat([mean, mean.cos()], 1)


def compare(model, scheduler, device, calls, **options):
    """Each call of a Sampler against `sample`, with other noise and classes each time."""
    sampler = Sampler(model, scheduler(), num_steps=4, cuda_graph=True, **options)
    TapeRecorder.host = (sampler._scheduler,)
    for i in range(calls):
        call = {"labels": torch.tensor([i % 2, 1], device=device), "seed": [i, 7]}
        expected = sample(model, scheduler(), (2, 3, 4, 4), num_steps=4, **call, **options)
        found = sampler((2, 3, 4, 4), **call)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert len(sampler._run._recorded) == 1


@pytest.mark.parametrize("name", SOLVERS)
def test_a_replayed_loop_gives_the_same_samples(name):
    model = BlurAndVariance() if name == "learned" else Blur()
    with tapes():
        compare(model, SOLVERS[name], "cpu", 4, **GUIDED if name != "eta" else {})


def test_a_network_is_replayed():
    torch.manual_seed(0)
    model = SmallUNet(3, (8, 16), num_classes=2).eval()
    with tapes():
        compare(model, DPMSolverMultistepScheduler, "cpu", 3, **GUIDED)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, DDPMScheduler])
def test_captured_on_cuda(scheduler):
    compare(Blur().cuda(), scheduler, "cuda", 4, **GUIDED)


def test_without_a_graph():
    sampler = Sampler(Blur(), DDIMScheduler(), num_steps=3)
    expected = sample(Blur(), DDIMScheduler(), (1, 1, 4, 4), num_steps=3, seed=5)
    assert sampler((1, 1, 4, 4), seed=5).equal(expected)


def test_refusals():
    with pytest.raises(ValueError, match="cuda_graph must be False for a model on cpu"):
        Sampler(Blur(), DDIMScheduler(), cuda_graph=True)
    with pytest.raises(ValueError, match="guidance_scale 3.0 needs labels and null_label"):
        Sampler(Blur(), DDIMScheduler(), **GUIDED)((1, 1, 4, 4))
    with pytest.raises(ValueError, match="labels must be 2"):
        Sampler(Blur(), DDIMScheduler())((2, 1, 4, 4), labels=torch.tensor([1]))
