"""Decoder-only transformers: loading, cached decoding and generation."""

from .cache import KVCache
from .cache_scales import calibrate_cache
from .config import DecoderConfig
from .decoder_lm import DecoderLM
from .engine import Engine
from .generate import generate, stream
from .request import Request, Update
from .rope import RopeScaling
from .sampling import Sampling

__all__ = [
    "DecoderConfig",
    "DecoderLM",
    "Engine",
    "KVCache",
    "Request",
    "RopeScaling",
    "Sampling",
    "Update",
    "calibrate_cache",
    "generate",
    "stream",
]
