"""The convolutional VAE: its shapes, its gradients, what it refuses."""

import pytest
import torch

from aigc_fast import ops
from aigc_fast.models.vae import ConvVAE


@pytest.mark.parametrize("num_classes", [None, 3])
@pytest.mark.parametrize(("size", "channels"), [(28, 1), (32, 3), (64, 3), (30, 2), (5, 1)])
def test_shapes(size, channels, num_classes):
    model = ConvVAE(size, channels, 8, 4, num_classes).to(memory_format=torch.channels_last)
    images = torch.randn(2, channels, size, size)
    labels = None if num_classes is None else torch.tensor([0, 2])
    parameters = model.encode(images, labels)
    assert parameters.shape == (2, 8)
    latents, kl = ops.sample_gaussian(parameters, torch.randn(2, 4))
    assert kl.shape == (2,)
    assert model.decode(latents, labels).shape == model(images, labels).shape == images.shape
    (model(images, labels).sum() + kl.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_samples_follow_the_generator():
    model = ConvVAE(8, 1, 8, 4, num_classes=3)
    labels = torch.tensor([0, 1, 2])
    first, again, other = (
        model.sample(3, labels, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert first.shape == (3, 1, 8, 8)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert ConvVAE(8, 3, 8).sample(2).shape == (2, 3, 8, 8)


def test_refuses():
    model = ConvVAE(8, 1, 8)
    with pytest.raises(ValueError, match="size must be at least 5"):
        ConvVAE(4)
    with pytest.raises(ValueError, match="channels must be a multiple of 8"):
        ConvVAE(channels=12)
    with pytest.raises(ValueError, match=r"images must have shape \(batch, 1, 8, 8\)"):
        model.encode(torch.randn(2, 1, 9, 9))
    with pytest.raises(ValueError, match="labels must be given if, and only if"):
        model.encode(torch.randn(2, 1, 8, 8), torch.tensor([0, 1]))
