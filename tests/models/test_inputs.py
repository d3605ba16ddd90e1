"""What networks say of an input that is not theirs, and the timesteps that they take."""

import re

import pytest
import torch
from torch import nn

from aigc_fast.models.diffusion import DiT, SmallUNet, UNet
from aigc_fast.models.gan import (
    DCGANDiscriminator,
    DCGANGenerator,
    MLPDiscriminator,
    MLPGenerator,
    R3GANDiscriminator,
    R3GANGenerator,
    RRDBNet,
    SRVGGNetCompact,
    StyleGAN2Discriminator,
    StyleGAN2Generator,
)
from aigc_fast.models.vae import VQVAE, AutoencoderKL, ConvVAE

AUTOENCODER = dict(
    block_out_channels=(8,) * 2,
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    norm_num_groups=4,
)
UNET = dict(
    block_out_channels=(8,) * 2,
    down_block_types=("DownBlock2D",) * 2,
    up_block_types=("UpBlock2D",) * 2,
    norm_num_groups=4,
    attention_head_dim=4,
)
DIT = dict(num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8)


def denoisers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    networks = {
        "unet": UNet(UNET),
        "small_unet": SmallUNet(channels=(8, 16)),
        "dit": DiT(DIT),
        "video": DiT(DIT | {"patch_size": (1, 2, 2)}),
    }
    for network in networks.values():
        for parameter in network.parameters():  # some begin with zeros, and answer with them
            nn.init.normal_(parameter, std=0.1)
    return networks


#: the samples that each of them takes
SAMPLES = {
    "unet": (3, 8, 8),
    "small_unet": (1, 8, 8),
    "dit": (4, 8, 8),
    "video": (4, 2, 8, 8),
}


def calls():
    """What is called, with what: the name and the shape of its argument without the batch, sizes
    that may be others as strings."""
    kl, vq, conv = AutoencoderKL(AUTOENCODER), VQVAE(AUTOENCODER), ConvVAE(8, 1, 8, 3)
    for network, (name, channels) in {
        kl.encode: ("images", 3),
        lambda x: kl.encode(x, tile=2): ("images", 3),
        kl.decode: ("latents", 4),
        lambda x: kl.decode(x, tile=2): ("latents", 4),
        vq.encode: ("images", 3),
        vq.decode: ("quantized", 3),
        SRVGGNetCompact(num_feat=4, num_conv=1): ("x", 3),
        RRDBNet(num_feat=4, num_block=1, num_grow_ch=4): ("x", 3),
    }.items():
        yield network, name, (channels, "6", "8")
    for name, network in denoisers().items():
        channels, *sizes = SAMPLES[name]
        run = lambda x, network=network: network(x, torch.ones(len(x)))  # noqa: E731
        yield run, "sample", (channels, *map(str, sizes))
    for network, name, shape in [
        (conv.encode, "images", (1, 8, 8)),
        (conv.decode, "latents", (3,)),
        (DCGANGenerator(28, 1, 4, 5), "latents", (5,)),
        (DCGANDiscriminator(28, 1, 4), "images", (1, 28, 28)),
        (R3GANGenerator(8, 1, 8, 5), "latents", (5,)),
        (R3GANDiscriminator(8, 1, 8), "images", (1, 8, 8)),
        (MLPGenerator((4, 8, 6)), "latents", (4,)),
        (MLPDiscriminator((6, 8, 1)), "images", (6,)),
        (StyleGAN2Generator(8, 5, max_channels=8), "z", (5,)),
        (StyleGAN2Discriminator(8, max_channels=8), "images", (3, 8, 8)),
    ]:
        yield network, name, shape


@pytest.mark.parametrize(("network", "name", "shape"), list(calls()))
def test_an_input_of_another_shape_is_named(network, name, shape) -> None:
    sizes = tuple(map(int, shape))
    with torch.no_grad():
        network(torch.randn(2, *sizes))
        wrong = [(2, sizes[0] + 1, *sizes[1:]), sizes, (2, *sizes, 1)]
        for dim, size in enumerate(shape[1:], 2):
            least = 0 if isinstance(size, str) else int(size) + 4
            wrong.append((2, *sizes[: dim - 1], least, *sizes[dim:]))
        for other in wrong:
            words = rf"^{name} must have shape \(batch, .*\), got {re.escape(str(other))}$"
            with pytest.raises(ValueError, match=words):
                network(torch.randn(other))


def test_what_is_no_tensor_is_named() -> None:
    with pytest.raises(TypeError, match="^images must be a torch.Tensor, got list$"):
        MLPDiscriminator((6, 8, 1))([0.0] * 6)


def test_images_of_less_than_a_latent_are_refused() -> None:
    for network in (AutoencoderKL(AUTOENCODER), VQVAE(AUTOENCODER)):
        network.encode(torch.randn(1, 3, 2, 2))
        with pytest.raises(ValueError, match=r"\(batch, 3, height >= 2, width >= 2\), got"):
            network.encode(torch.randn(1, 3, 1, 2))


@pytest.mark.parametrize("name", SAMPLES)
@torch.no_grad()
def test_one_timestep_is_that_of_all(name) -> None:
    network, sample = denoisers()[name], torch.randn(2, *SAMPLES[name])
    for timestep in (3, 2.5):
        expected = network(sample, torch.tensor([timestep, timestep]))
        assert not expected.equal(network(sample, torch.tensor([timestep, 90])))
        for one in (timestep, torch.tensor(timestep), torch.tensor([timestep])):
            assert network(sample, one).equal(expected)
    with pytest.raises(ValueError, match=r"^timesteps must be a number or have shape \(2,\), got"):
        network(sample, torch.ones(3))
    with pytest.raises(TypeError, match="^timesteps must be a number or a torch.Tensor, got str$"):
        network(sample, "3")
