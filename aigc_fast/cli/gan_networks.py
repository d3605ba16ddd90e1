"""The networks that `aigc-fast train gan` and `sample gan` know, from a few numbers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from aigc_fast.models.gan import (
    DCGANDiscriminator,
    DCGANGenerator,
    MLPDiscriminator,
    MLPGenerator,
    R3GANDiscriminator,
    R3GANGenerator,
)

#: A network's numbers as the checkpoint holds them: arch, size, image_channels, channels,
#: num_classes (None for no labels) and norm (of DCGAN's discriminator)
Config = dict[str, Any]
#: numbers of a latent vector, of every architecture
LATENT_DIM = 100


def make_generator(config: Config) -> nn.Module:
    return _ARCHITECTURES[config["arch"]][0](config)


def make_discriminator(config: Config) -> nn.Module:
    return _ARCHITECTURES[config["arch"]][1](config)


class _OfImages(nn.Module):
    """A generator of flat samples as one of images."""

    def __init__(self, network: MLPGenerator, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.network, self.shape = network, shape

    def forward(self, latents: Tensor) -> Tensor:
        return self.network(latents).view(-1, *self.shape)


def _mlp_generator(config: Config) -> nn.Module:
    if config["num_classes"] is not None:
        raise ValueError("conditional: the architecture mlp takes no labels")
    shape = (config["image_channels"], config["size"], config["size"])
    sizes = (LATENT_DIM, 256, 512, 1024, shape[0] * shape[1] * shape[2])
    return _OfImages(MLPGenerator(sizes), shape)


def _mlp_discriminator(config: Config) -> nn.Module:
    pixels = config["image_channels"] * config["size"] ** 2
    return nn.Sequential(nn.Flatten(), MLPDiscriminator((pixels, 1024, 512, 256, 1)))


def _dcgan_generator(config: Config) -> nn.Module:
    return DCGANGenerator(
        config["size"], config["image_channels"], config["channels"], LATENT_DIM,
        num_classes=config["num_classes"],
    )  # fmt: skip


def _dcgan_discriminator(config: Config) -> nn.Module:
    return DCGANDiscriminator(
        config["size"], config["image_channels"], config["channels"],
        norm=config["norm"], num_classes=config["num_classes"],
    )  # fmt: skip


def _r3gan_generator(config: Config) -> nn.Module:
    return R3GANGenerator(
        config["size"], config["image_channels"], config["channels"], LATENT_DIM,
        num_classes=config["num_classes"],
    )  # fmt: skip


def _r3gan_discriminator(config: Config) -> nn.Module:
    return R3GANDiscriminator(
        config["size"], config["image_channels"], config["channels"],
        num_classes=config["num_classes"],
    )  # fmt: skip


_ARCHITECTURES: dict[str, tuple[Callable[[Config], nn.Module], Callable[[Config], nn.Module]]] = {
    "mlp": (_mlp_generator, _mlp_discriminator),
    "dcgan": (_dcgan_generator, _dcgan_discriminator),
    "r3gan": (_r3gan_generator, _r3gan_discriminator),
}
ARCHITECTURES = tuple(_ARCHITECTURES)


@torch.no_grad()
def draw(generator: nn.Module, latents: Tensor, labels: Tensor | None, batch: int = 256) -> Tensor:
    """Samples (count, channels, height, width) on the CPU, a batch at a time."""
    inputs = [latents] if labels is None else [latents, labels]
    pieces = zip(*(tensor.split(batch) for tensor in inputs), strict=True)
    return torch.cat([generator(*piece) for piece in pieces]).float().cpu()
