"""DCGAN against the plain torch sequence of the same weights."""

import pytest
import torch
from torch import nn

from aigc_fast.models.gan import DCGANDiscriminator, DCGANGenerator


def plain_generator():
    """As PyTorch's example has it, for 32 pixels."""
    layers = [nn.ConvTranspose2d(6, 8, 4, 1, 0, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    layers += [nn.ConvTranspose2d(8, 4, 4, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
    layers += [nn.ConvTranspose2d(4, 2, 4, 2, 1, bias=False), nn.BatchNorm2d(2), nn.ReLU()]
    return nn.Sequential(*layers, nn.ConvTranspose2d(2, 3, 4, 2, 1, bias=False), nn.Tanh())


def plain_discriminator(norm):
    def normed(channels):
        if norm == "batch":
            return [nn.BatchNorm2d(channels)]
        if norm is None:
            return []
        return [nn.GroupNorm(1 if norm == "layer" else channels, channels)]

    bias = norm is None
    layers = [nn.Conv2d(3, 2, 4, 2, 1, bias=bias), nn.LeakyReLU(0.2)]
    for width in (2, 4):
        layers.append(nn.Conv2d(width, 2 * width, 4, 2, 1, bias=bias))
        layers += [*normed(2 * width), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(8, 1, 4, bias=bias), nn.Flatten())


CASES = {
    "generator": lambda: (DCGANGenerator(32, 3, 2, latent_dim=6), plain_generator()),
    **{
        f"discriminator_{norm}": lambda norm=norm: (
            DCGANDiscriminator(32, 3, 2, norm),
            plain_discriminator(norm),
        )
        for norm in ("batch", "layer", "instance", None)
    },
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_the_plain_sequence(case, training):
    ours, theirs = (network.double().train(training) for network in CASES[case]())
    theirs.load_state_dict({k.removeprefix("main."): v for k, v in ours.state_dict().items()})
    shape = (3, 6) if case == "generator" else (3, 3, 32, 32)
    x = torch.randn(shape, dtype=torch.float64)

    def derivatives(network, x):
        leaf = x.clone().requires_grad_()
        y = network(leaf)
        first = torch.autograd.grad(y.square().sum(), [leaf, *network.parameters()])
        return [y, *first, *network.buffers()]

    plain = derivatives(theirs, x[:, :, None, None] if case == "generator" else x)
    plain[1] = plain[1].view(shape)
    for a, b in zip(derivatives(ours, x), plain, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("size", [28, 32, 64, 128])
def test_sizes_and_labels(size):
    generator = DCGANGenerator(size, 1, 2, latent_dim=4, num_classes=3)
    discriminator = DCGANDiscriminator(size, 1, 2, num_classes=3)
    labels = torch.tensor([0, 2])
    images = generator(torch.randn(2, 4), labels)
    assert images.shape == (2, 1, size, size) and images.abs().max() <= 1
    logits = discriminator(images, labels)
    assert logits.shape == (2, 1)
    assert not torch.equal(logits, discriminator.eval()(images, labels.flip(0)))


def test_runs_under_autocast_and_in_channels_last():
    generator, critic = DCGANGenerator(28, 1, 4), DCGANDiscriminator(28, 1, 4, norm="layer")
    generator, critic = (m.to(memory_format=torch.channels_last) for m in (generator, critic))
    latents = torch.randn(2, 100)
    exact = critic(generator(latents))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = critic(generator(latents))
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=0.1, atol=0.02)


def test_refusals():
    with pytest.raises(ValueError, match="size must be one of 28, 32, 64, 128, got 30"):
        DCGANGenerator(30)
    with pytest.raises(ValueError, match="norm must be one of"):
        DCGANDiscriminator(norm="group")
    for network, x in ((DCGANGenerator(28, 1, 2), torch.randn(1, 100)),):
        with pytest.raises(ValueError, match="labels must be given if, and only if"):
            network(x, torch.tensor([0]))
    with pytest.raises(ValueError, match="labels must be given if, and only if"):
        DCGANDiscriminator(28, 1, 2, num_classes=2)(torch.randn(1, 1, 28, 28))
