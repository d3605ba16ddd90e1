"""Decoder-only transformers: loading, cached decoding and generation."""

from .cache import KVCache
from .config import DecoderConfig
from .decoder_lm import DecoderLM
from .generate import generate, stream_tokens

__all__ = ["DecoderConfig", "DecoderLM", "KVCache", "generate", "stream_tokens"]
