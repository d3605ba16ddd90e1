"""Decoder-only transformers: loading, cached decoding and generation."""

from .cache import KVCache
from .config import DecoderConfig
from .decoder_lm import DecoderLM
from .generate import generate, stream_tokens
from .rope import RopeScaling

__all__ = ["DecoderConfig", "DecoderLM", "KVCache", "RopeScaling", "generate", "stream_tokens"]
