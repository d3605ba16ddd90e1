"""Variational autoencoders."""

from .autoencoder_kl import AutoencoderKL

__all__ = ["AutoencoderKL"]
