"""Variational autoencoders."""

from .autoencoder_kl import AutoencoderKL
from .conv_vae import ConvVAE
from .vq_vae import VQVAE

__all__ = ["VQVAE", "AutoencoderKL", "ConvVAE"]
