"""Generative adversarial networks."""

from .dcgan import DCGANDiscriminator, DCGANGenerator
from .mlp import MLPDiscriminator, MLPGenerator
from .stylegan2 import StyleGAN2Generator
from .stylegan2_discriminator import StyleGAN2Discriminator
from .stylegan2_weights import load_stylegan2

__all__ = [
    "DCGANDiscriminator",
    "DCGANGenerator",
    "MLPDiscriminator",
    "MLPGenerator",
    "StyleGAN2Discriminator",
    "StyleGAN2Generator",
    "load_stylegan2",
]
