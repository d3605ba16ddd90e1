"""Speech: vocoders, and text to speech on top of them."""

from .bigvgan import BigVGANGenerator
from .hifigan import HiFiGANGenerator
from .vits import VITS
from .vits_config import VITSConfig

__all__ = ["VITS", "BigVGANGenerator", "HiFiGANGenerator", "VITSConfig"]
