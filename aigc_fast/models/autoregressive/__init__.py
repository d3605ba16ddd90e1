"""Decoder-only transformers: loading, cached decoding and generation."""

from .cache import KVCache
from .config import DecoderConfig
from .decoder_lm import DecoderLM
from .generate import Sampling, generate, stream_tokens
from .rope import RopeScaling

__all__ = [
    "DecoderConfig",
    "DecoderLM",
    "KVCache",
    "RopeScaling",
    "Sampling",
    "generate",
    "stream_tokens",
]
