"""The small U-Net, the schedule and the DDIM sampler."""

import pytest
import torch
import torch.nn.functional as F

from aigc_fast import schedulers
from aigc_fast.models.diffusion import SmallUNet, sample_images
from aigc_fast.models.diffusion.attention import attend
from aigc_fast.ops.scaled_dot_product_attention import has_attention
from aigc_fast.schedulers import DDIMScheduler
from tests.ops.test_every_op import assert_as_good_as_torch


def small_unet(**options):
    return SmallUNet(channels=(8, 16), **options).double()


@pytest.mark.parametrize("size", [(28, 28), (32, 20), (2, 6)])
def test_output_has_the_shape_of_the_sample(size):
    sample = torch.randn(2, 3, *size, dtype=torch.float64)
    out = small_unet(image_channels=3)(sample, torch.tensor([0, 999]), torch.tensor([3, 10]))
    assert out.shape == sample.shape


@pytest.mark.parametrize("shape", [(2, 3, 7, 8), (2, 3, 8, 7)])
def test_samples_of_other_sizes_are_refused(shape):
    with pytest.raises(ValueError, match="height and width that are multiples of 2, got"):
        small_unet(image_channels=3)(torch.randn(shape), torch.tensor([0, 999]))


def test_no_labels_means_any():
    model = small_unet(num_classes=4)
    torch.nn.init.normal_(model.conv_out.weight)
    sample, timesteps = torch.randn(2, 1, 28, 28, dtype=torch.float64), torch.tensor([5, 700])
    any_class = model(sample, timesteps, torch.tensor([4, 4]))
    torch.testing.assert_close(model(sample, timesteps), any_class)
    torch.nn.init.normal_(model.label.weight)
    for block in model.modules():
        if hasattr(block, "conv2"):
            torch.nn.init.normal_(block.conv2.weight, std=0.1)
    one = model(sample, timesteps, torch.tensor([1, 1]))
    assert not torch.allclose(one, model(sample, timesteps))


def test_every_parameter_is_trained():
    model = small_unet()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    out = model(torch.randn(2, 1, 12, 12, dtype=torch.float64), torch.tensor([5, 700]))
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


class Oracle(torch.nn.Module):
    """Knows the answer: the v of a data set that holds one image for each class, or their mean."""

    def __init__(self, images, alphas_cumprod):
        super().__init__()
        self.images = images
        self.alphas, self.sigmas = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()

    def forward(self, sample, timesteps, labels=None):
        one, timesteps = (-1, 1, 1, 1), timesteps.long()
        alpha, sigma = self.alphas[timesteps].view(one), self.sigmas[timesteps].view(one)
        x0 = self.images[labels if labels is not None else torch.zeros_like(timesteps)]
        noise = (sample - alpha * x0) / sigma
        return alpha * noise - sigma * x0


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_ddim_finds_what_the_model_knows(guidance_scale):
    # Guidance leads from the image of "any" through that of the class and, at 2, as far beyond.
    images = torch.stack([torch.full((1, 4, 4), v) for v in (-0.5, 0.25, 0.0)])
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    model = Oracle(images, scheduler.alphas_cumprod)
    labels = torch.tensor([0, 1, 1])
    noise = torch.randn(3, 1, 4, 4)
    stages = list(
        sample_images(
            model,
            noise,
            scheduler,
            labels=labels,
            null_label=2,
            num_steps=5,
            guidance_scale=guidance_scale,
        )
    )
    assert len(stages) == 5
    sample, x0 = stages[-1]
    torch.testing.assert_close(sample, guidance_scale * images[labels], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(x0, sample)


@pytest.mark.parametrize(
    "scheduler",
    [
        schedulers.DDIMScheduler,
        schedulers.EulerDiscreteScheduler,
        schedulers.HeunDiscreteScheduler,
        schedulers.DPMSolverMultistepScheduler,
        schedulers.UniPCMultistepScheduler,
    ],
)
def test_schedulers_by_time_and_by_noise_find_what_the_model_knows(scheduler):
    scheduler = scheduler(prediction_type="v_prediction", timestep_spacing="trailing")
    images = torch.linspace(-0.5, 0.5, 16).view(1, 1, 4, 4)
    model = Oracle(images, scheduler.alphas_cumprod)
    noise = torch.randn(2, 1, 4, 4)
    *_, (sample, _) = sample_images(model, noise, scheduler, num_steps=10)
    torch.testing.assert_close(sample, images.expand(2, -1, -1, -1), atol=1e-3, rtol=0)


@pytest.mark.parametrize("autocast", [False, True])
def test_attention_in_training_is_as_good_as_torch(autocast):
    low = [torch.randn(2, 3, 16, 8).to(torch.bfloat16) for _ in range(3)]

    def with_gradients(attention, tensors):
        inputs = [t.clone().requires_grad_() for t in tensors]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = attention(*inputs)
        return [y, *torch.autograd.grad(y.sum(), inputs)]

    mine = with_gradients(attend, low)
    exact = [t.double() for t in low]
    y = F.scaled_dot_product_attention(*[t.requires_grad_() for t in exact])
    exact = [y.detach(), *torch.autograd.grad(y.sum(), exact)]
    plain = with_gradients(F.scaled_dot_product_attention, low)
    assert_as_good_as_torch(mine, plain, exact, torch.bfloat16)
    if has_attention(*low):
        return
    # What float32 gives, rounded: closer than any product in bfloat16 would be.
    wide = F.scaled_dot_product_attention(*(t.float() for t in low))
    assert torch.equal(mine[0], wide.to(torch.bfloat16))
    assert torch.equal(attend(*low), F.scaled_dot_product_attention(*low))


def test_attention_in_training_compiles_whole():
    low = [torch.randn(2, 3, 16, 8).to(torch.bfloat16).requires_grad_() for _ in range(3)]
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*low), attend(*low), rtol=0.02, atol=0.02)
