"""The autoencoder of latent diffusion: diffusers' AutoencoderKL."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from aigc_fast.models.diffusion.load import DiffusersModel, resolve
from aigc_fast.ops._checks import check_positive

from ..inputs import check_input
from .networks import OPTIONS, Decoder, Encoder, check
from .tiles import blend_tiles

_OPTIONS: dict[str, Any] = OPTIONS | dict(
    latent_channels=4,
    scaling_factor=0.18215,
    shift_factor=None,
    use_quant_conv=True,
    use_post_quant_conv=True,
)
_FIXED: dict[str, Any] = dict(latents_mean=None, latents_std=None)


class AutoencoderKL(DiffusersModel):
    """Encodes images to the distribution of their latents, and decodes latents to images.

    config: what config.json of diffusers' AutoencoderKL says: Stable Diffusion 1, 2, XL and 3,
            Flux. What is left out is diffusers' default. Names of parameters are diffusers' own.

    `encode` and `decode` are the bare networks: neither of them scales. What a diffusion model
    works on is `scale(latents)`, and `decode` takes `unscale` of what it gives:

        parameters = autoencoder.encode(images)
        mean, logvar = parameters.chunk(2, dim=1)
        latents = autoencoder.scale(mean)
        images = autoencoder.decode(autoencoder.unscale(latents))

    Images lie in [-1, 1]. Attributes: `factor`, pixels of an image along a side of a latent;
    `config`, the options as attributes. The config's force_upcast means that activations outgrow
    float16 (Stable Diffusion XL): choose float32 or bfloat16 for such a checkpoint.

    Runs fastest in channels_last, on CPUs with AMX and on GPUs in bfloat16 too; a checkpoint keeps
    its layout and dtype until `.to` changes it.

    Not supported: blocks other than DownEncoderBlock2D and UpDecoderBlock2D, a mean and standard
    deviation for each latent channel. ValueError names an option that is not supported or known.

    >>> AutoencoderKL(dict(block_out_channels=(32, 64),
    ...                    down_block_types=("DownEncoderBlock2D",) * 2,
    ...                    up_block_types=("UpDecoderBlock2D",) * 2))

    Source: Rombach et al. 2022, arXiv:2112.10752.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = o = resolve(config, _OPTIONS, _FIXED)
        check(o)
        self.factor = 2 ** (len(o.block_out_channels) - 1)
        moments, latents = 2 * o.latent_channels, o.latent_channels
        self.encoder, self.decoder = Encoder(o, moments), Decoder(o)
        self.quant_conv = nn.Conv2d(moments, moments, 1) if o.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latents, latents, 1) if o.use_post_quant_conv else None

    def forward(self, images: Tensor) -> Tensor:
        """Images of the means of their latents."""
        return self.decode(self.encode(images).chunk(2, dim=1)[0])

    def encode(
        self, images: Tensor, *, tile: int | None = None, overlap: int | None = None
    ) -> Tensor:
        """(batch, in_channels, height, width) to (batch, 2 latent_channels, height / factor, ...).

        The result is the mean, then the logarithm of the variance, along dim 1, not scaled. Sizes
        that `factor` does not divide are rounded down.

        tile, overlap: in latents, see `decode`; the bound of memory has block_out_channels[0].
        """
        channels = self.config.in_channels
        check_input("images", images, channels, "height", "width", least=self.factor)
        return self._in_tiles(self._encode, images, tile, overlap, (self.factor, 1))

    def decode(
        self, latents: Tensor, *, tile: int | None = None, overlap: int | None = None
    ) -> Tensor:
        """(batch, latent_channels, h, w), not scaled, to (batch, out_channels, factor h, factor w).

        tile:    None for the whole at once, or the side of a tile in latents (of `factor` pixels),
                 at least 1. Sizes no larger than a tile go through whole, with the same bits.
        overlap: of neighbouring tiles, in latents, at least 0 and below `tile`; None is a quarter
                 of `tile`. There the tiles are blended linearly (models/vae/tiles.py).

        Group norms and attention then see one tile, so the result is near that of the whole, not
        equal to it. Memory without gradients: the result, in float32 too, and the activations of
        one tile, three times batch * block_out_channels[1] * (factor * tile)^2 values where no
        level has more than four times the channels of the one above it; beside them, what torch's
        convolutions and attention take for themselves.
        """
        check_input("latents", latents, self.config.latent_channels, "height", "width")
        return self._in_tiles(self._decode, latents, tile, overlap, (1, self.factor))

    def scale(self, latents: Tensor) -> Tensor:
        """(latents - shift_factor) * scaling_factor: what a diffusion model works on."""
        return (latents - (self.config.shift_factor or 0.0)) * self.config.scaling_factor

    def unscale(self, latents: Tensor) -> Tensor:
        """latents / scaling_factor + shift_factor: what `decode` takes."""
        return latents / self.config.scaling_factor + (self.config.shift_factor or 0.0)

    def _encode(self, images: Tensor) -> Tensor:
        moments = self.encoder(images)
        return moments if self.quant_conv is None else self.quant_conv(moments)

    def _decode(self, latents: Tensor) -> Tensor:
        return self.decoder(
            latents if self.post_quant_conv is None else self.post_quant_conv(latents)
        )

    @staticmethod
    def _in_tiles(
        run: Callable[[Tensor], Tensor],
        x: Tensor,
        tile: int | None,
        overlap: int | None,
        unit: tuple[int, int],
    ) -> Tensor:
        if tile is None:
            if overlap is not None:
                raise ValueError("overlap must be None without a tile")
            return run(x)
        check_positive(tile=tile)
        overlap = tile // 4 if overlap is None else overlap
        if not 0 <= overlap < tile:
            raise ValueError(f"overlap must be at least 0 and below tile ({tile}), got {overlap}")
        return blend_tiles(run, x, tile, overlap, unit)
