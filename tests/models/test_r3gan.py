"""R3GAN's networks against plain PyTorch of the same weights, to the second derivative."""

import pytest
import torch
import torch.nn.functional as F

from aigc_fast.models.gan import R3GANDiscriminator, R3GANGenerator
from aigc_fast.models.gan.r3gan import ResidualBlock

WIDE = {"channels": 4, "max_channels": 12, "num_classes": 3}  # 12, 8 and 4 channels


def generator(size=16):
    return _with_all_weights(R3GANGenerator(size, 3, latent_dim=5, **WIDE))


def discriminator(size=16):
    return _with_all_weights(R3GANDiscriminator(size, 3, **WIDE))


def _with_all_weights(model):
    """Zeros, which Fixup begins with, would hide a mistake."""
    for p in model.parameters():
        if not p.any():
            p.data.normal_(0, 0.3)
    return model.double()


# ---- the same in plain PyTorch, functions of the state dict ------------------------------------


def plain_body(weights, x, layers):
    """layers: of each member of `main`, what it is."""
    for i, kind in enumerate(layers):
        w = {k.removeprefix(f"main.{i}."): v for k, v in weights.items()}
        if kind == "block":
            y = F.conv2d(x, w["conv1.weight"], w["conv1.bias"])
            groups = y.shape[1] // w["conv2.weight"].shape[1]
            y = F.leaky_relu(y, 0.2)
            y = F.conv2d(y, w["conv2.weight"], w["conv2.bias"], padding=1, groups=groups)
            x = x + F.conv2d(F.leaky_relu(y, 0.2), w["conv3.weight"])
        elif kind == "conv":
            x = F.conv2d(x, w["weight"])
        else:  # bilinear, with zeros around
            taps = torch.tensor([1.0, 3.0, 3.0, 1.0]).to(x)
            taps = torch.outer(taps, taps).expand(x.shape[1], 1, 4, 4)
            change = F.conv_transpose2d if kind == "up" else F.conv2d
            divisor = 16 if kind == "up" else 64
            x = change(x, taps / divisor, stride=2, padding=1, groups=x.shape[1])
    return x


BLOCKS = ["block", "block"]


def plain_generate(weights, latents, labels):
    given = torch.cat([latents, weights["embed.weight"][labels]], 1)
    x = (given @ weights["linear.weight"].T)[:, :, None, None] * weights["basis"]
    layers = BLOCKS + 2 * ["conv", "up", *BLOCKS] + ["conv"]
    return plain_body(weights, x, layers)


def plain_discriminate(weights, images, labels):
    layers = ["conv", *BLOCKS] + 2 * ["down", "conv", *BLOCKS]
    x = plain_body(weights, images, layers)
    features = torch.einsum("nchw,chw->nc", x, weights["basis"]) @ weights["linear.weight"].T
    return (features * weights["embed.weight"][labels]).sum(1, keepdim=True)


def derivatives(network, parameters, x):
    """Output, gradients, and gradients of a penalty on that of x."""
    x = x.clone().requires_grad_()
    y = network(x)
    (first,) = torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), x,
                                   create_graph=True)  # fmt: skip
    total = first.square().sum() + y.square().sum()
    return [y, first, *torch.autograd.grad(total, [x, *parameters])]


@pytest.mark.parametrize("part", ["generator", "discriminator"])
def test_is_the_plain_network_to_the_second_derivative(part):
    torch.manual_seed(0)
    labels = torch.tensor([2, 0, 1])
    if part == "generator":
        model, plain, x = generator(), plain_generate, torch.randn(3, 5)
    else:
        model, plain, x = discriminator(), plain_discriminate, torch.randn(3, 3, 16, 16)
    weights, parameters = dict(model.named_parameters()), list(model.parameters())
    ours = derivatives(lambda x: model(x, labels), parameters, x.double())
    theirs = derivatives(lambda x: plain(weights, x, labels), parameters, x.double())
    assert len(ours) == 3 + len(parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_starts_as_if_it_had_no_blocks():
    network = R3GANDiscriminator(16, 3, 32, blocks=6)
    x = torch.randn(2, 3, 16, 16)
    rest = torch.nn.Sequential(*(m for m in network.main if not isinstance(m, ResidualBlock)))
    torch.testing.assert_close(network.main(x), rest(x))
    for conv in (network.main[1].conv1, network.main[1].conv2):
        variance = 2 / (1 + 0.2**2) / conv.weight[0].numel()  # of He et al. for this leaky ReLU
        deviation = (variance / 18**0.5) ** 0.5  # 6 blocks in 3 stages
        torch.testing.assert_close(conv.weight.std().item(), deviation, rtol=0.1, atol=0)


@pytest.mark.parametrize(("size", "first"), [(28, 7), (32, 4), (96, 6), (256, 4)])
def test_sizes(size, first):
    with torch.device("meta"):
        g, d = R3GANGenerator(size, 1, 32, 10), R3GANDiscriminator(size, 1, 32)
        assert g.basis.shape[1:] == d.basis.shape[1:] == (first, first)
        assert len(g.basis) == min(32 * size // first, 768)
        images = g(torch.randn(2, 10))
        assert images.shape == (2, 1, size, size) and d(images).shape == (2, 1)


def test_autocast_and_channels_last():
    g, d = generator(28).float(), discriminator(28).float()
    latents, labels = torch.randn(4, 5), torch.tensor([0, 1, 2, 0])
    images = g(latents, labels)
    logits = d(images, labels)
    g, d = (m.to(memory_format=torch.channels_last) for m in (g, d))
    torch.testing.assert_close(d(g(latents, labels), labels), logits, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = d(g(latents, labels), labels)
    assert rounded.dtype == torch.bfloat16
    assert (rounded - logits).abs().max() < 0.1 * logits.abs().max()


def test_refusals():
    for size in (3, 30, 0, 1023):
        with pytest.raises(ValueError, match=f"size must be 4, 5, 6 or 7 times .* got {size}"):
            R3GANGenerator(size)
    with pytest.raises(ValueError, match="labels must be given if, and only if"):
        generator(8)(torch.randn(1, 5))
    with pytest.raises(ValueError, match="labels must be given if, and only if"):
        R3GANDiscriminator(8, 1, 4)(torch.randn(1, 1, 8, 8), torch.tensor([0]))
