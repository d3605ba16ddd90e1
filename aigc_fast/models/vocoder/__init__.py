"""Speech: vocoders, and text to speech on top of them."""

from .hifigan import HiFiGANGenerator

__all__ = ["HiFiGANGenerator"]
