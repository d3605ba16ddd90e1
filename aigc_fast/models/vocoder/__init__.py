"""Speech: vocoders, and text to speech on top of them."""

from .hifigan import HiFiGANGenerator
from .vits import VITS
from .vits_config import VITSConfig

__all__ = ["VITS", "HiFiGANGenerator", "VITSConfig"]
