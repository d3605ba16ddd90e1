"""Diffusion models."""

from .dit import DiT
from .sampling import Sampler, sample, sample_images
from .small_unet import SmallUNet
from .unet import UNet

__all__ = ["DiT", "Sampler", "SmallUNet", "UNet", "sample", "sample_images"]
