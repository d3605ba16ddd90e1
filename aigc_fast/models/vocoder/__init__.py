"""Speech: vocoders, and text to speech on top of them."""

from .bigvgan import BigVGANGenerator
from .discriminators import VocoderDiscriminator
from .hifigan import HiFiGANGenerator
from .mel import MelConfig, MelSpectrogram
from .vits import VITS
from .vits_config import VITSConfig

__all__ = [
    "VITS",
    "BigVGANGenerator",
    "HiFiGANGenerator",
    "MelConfig",
    "MelSpectrogram",
    "VITSConfig",
    "VocoderDiscriminator",
]
