"""Variational autoencoders."""

from .autoencoder_kl import AutoencoderKL
from .vq_vae import VQVAE

__all__ = ["VQVAE", "AutoencoderKL"]
