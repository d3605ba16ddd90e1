"""VQ-VAE with a convolutional encoder and decoder: diffusers' VQModel."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from aigc_fast.models.diffusion.load import DiffusersModel, resolve
from aigc_fast.nn import VectorQuantizer

from ..inputs import check_input
from .networks import OPTIONS, Decoder, Encoder, check

_OPTIONS: dict[str, Any] = OPTIONS | dict(
    latent_channels=3,
    num_vq_embeddings=256,
    vq_embed_dim=None,
    scaling_factor=0.18215,  # of who trains on the latents: nothing here scales
)
_FIXED: dict[str, Any] = dict(norm_type="group", lookup_from_codebook=False)


class VQVAE(DiffusersModel):
    """Images to indices of a codebook, and back.

    config: what config.json of diffusers' VQModel says; what is left out is diffusers' default.
            Names of parameters are diffusers' own.
    beta, decay, restart_below: of the codebook, see `nn.VectorQuantizer`. A decay adds two buffers
            to the state dict.

    Attributes: `factor`, pixels of an image along a side of a latent; `quantize`, the
    `nn.VectorQuantizer`; `config`, the options as attributes.

        quantized, indices, loss = model.quantize(model.encode(images))
        images = model.decode(model.quantize.lookup(indices))

    ValueError names an option that is not supported or known.

    Source: van den Oord et al. 2017, arXiv:1711.00937; Esser et al. 2021, arXiv:2012.09841.

    >>> VQVAE(dict(block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2,
    ...            up_block_types=("UpDecoderBlock2D",) * 2), decay=0.99)
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        beta: float = 0.25,
        decay: float | None = None,
        restart_below: float = 0.0,
    ) -> None:
        super().__init__()
        self.config = o = resolve(config, _OPTIONS, _FIXED)
        check(o)
        self.factor = 2 ** (len(o.block_out_channels) - 1)
        features = o.vq_embed_dim or o.latent_channels
        self.encoder = Encoder(o, o.latent_channels)
        self.quant_conv = nn.Conv2d(o.latent_channels, features, 1)
        self.quantize = VectorQuantizer(
            o.num_vq_embeddings, features, beta=beta, decay=decay, restart_below=restart_below
        )
        self.post_quant_conv = nn.Conv2d(features, o.latent_channels, 1)
        self.decoder = Decoder(o)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(reconstructed images, indices (batch, h, w), loss of the codebook): add the
        reconstruction's own loss to train."""
        quantized, indices, loss = self.quantize(self.encode(images))
        return self.decode(quantized), indices, loss

    def encode(self, images: Tensor) -> Tensor:
        """(batch, in_channels, height, width) to vectors that are not quantized yet, (batch,
        vq_embed_dim, height / factor, width / factor), rounded down."""
        channels = self.config.in_channels
        check_input("images", images, channels, "height", "width", least=self.factor)
        return self.quant_conv(self.encoder(images))

    def decode(self, quantized: Tensor) -> Tensor:
        """(batch, vq_embed_dim, h, w) to (batch, out_channels, factor h, factor w); quantizes
        nothing."""
        check_input("quantized", quantized, self.post_quant_conv.in_channels, "height", "width")
        return self.decoder(self.post_quant_conv(quantized))
