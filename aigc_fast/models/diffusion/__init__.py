"""Diffusion models."""

from .sampling import sample, sample_images
from .unet import UNet

__all__ = ["UNet", "sample", "sample_images"]
