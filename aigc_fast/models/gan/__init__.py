"""Generative adversarial networks."""

from .dcgan import DCGANDiscriminator, DCGANGenerator
from .load_ncnn import load_generator
from .mlp import MLPDiscriminator, MLPGenerator
from .r3gan import R3GANDiscriminator, R3GANGenerator
from .rrdb import RRDBNet
from .srvgg import SRVGGNetCompact
from .stylegan2 import StyleGAN2Generator
from .stylegan2_discriminator import StyleGAN2Discriminator
from .stylegan2_weights import load_stylegan2
from .upscale import upscale

__all__ = [
    "DCGANDiscriminator",
    "DCGANGenerator",
    "MLPDiscriminator",
    "MLPGenerator",
    "R3GANDiscriminator",
    "R3GANGenerator",
    "RRDBNet",
    "SRVGGNetCompact",
    "StyleGAN2Discriminator",
    "StyleGAN2Generator",
    "load_generator",
    "load_stylegan2",
    "upscale",
]
