"""Diffusion models."""

from .ddim import cosine_schedule, ddim_rows, sample_ddim
from .unet import UNet

__all__ = ["UNet", "cosine_schedule", "ddim_rows", "sample_ddim"]
