"""Diffusion models."""

from .sampling import sample_images
from .unet import UNet

__all__ = ["UNet", "sample_images"]
