"""The generator of StyleGAN2 (Karras et al. 2020, arXiv:1912.04958), skip architecture."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from aigc_fast.models.gan.stylegan2_layers import (
    StyledConv,
    ToRGB,
    channels_at,
    one_hot,
    pixel_norm,
    resolutions_up_to,
)
from aigc_fast.models.inputs import check_input
from aigc_fast.nn import EqualizedLinear


class PixelNorm(nn.Module):
    """The first member of the mapping network; it has no weights."""

    def forward(self, x: Tensor) -> Tensor:
        return pixel_norm(x)


class StyleGAN2Generator(nn.Module):
    """Latent vectors (batch, style_dim) to images (batch, image_channels, resolution, resolution).

    resolution:         a power of 2, 8 to 2048.
    style_dim:          width of the latent and style vectors.
    mapping_layers:     of the network from latents to styles.
    channel_multiplier: width of the layers above 32 x 32; 2 is config F of the paper.
    max_channels:       width of the layers below.
    num_classes:        more than 0: a conditional model, whose calls take labels (batch,).
    clamp:              limit on activations, 256 for float16; None for none.
    mapping_lr:         factor on the learning rate of the mapping network.

    State dict: the names of rosinality's `g_ema`, so that weights travel in both directions (see
    `load_stylegan2`), and `latent_avg`, the average style.
    """

    latent_avg: Tensor

    def __init__(
        self,
        resolution: int,
        style_dim: int = 512,
        mapping_layers: int = 8,
        *,
        channel_multiplier: float = 2,
        max_channels: int = 512,
        image_channels: int = 3,
        num_classes: int = 0,
        clamp: float | None = None,
        mapping_lr: float = 0.01,
    ) -> None:
        super().__init__()
        sizes = resolutions_up_to(resolution)
        self.resolution, self.style_dim, self.num_classes = resolution, style_dim, num_classes
        first = 2 * style_dim if num_classes else style_dim
        dense = [
            EqualizedLinear(first if i == 0 else style_dim, style_dim, "lrelu", lr_mul=mapping_lr)
            for i in range(mapping_layers)
        ]
        self.style = nn.Sequential(PixelNorm(), *dense)
        self.embed = EqualizedLinear(num_classes, style_dim) if num_classes else None
        c = channels_at(4, channel_multiplier, max_channels)
        self.input = nn.ParameterDict({"input": torch.randn(1, c, 4, 4)})
        self.conv1 = StyledConv(c, c, style_dim, clamp=clamp)
        self.to_rgb1 = ToRGB(c, style_dim, image_channels, up=1)
        self.convs, self.to_rgbs = nn.ModuleList(), nn.ModuleList()
        self.noises = nn.Module()
        self.noises.register_buffer("noise_0", torch.randn(1, 1, 4, 4))
        for size in sizes:
            before, c = c, channels_at(size, channel_multiplier, max_channels)
            self.convs.append(StyledConv(before, c, style_dim, up=2, clamp=clamp))
            self.convs.append(StyledConv(c, c, style_dim, clamp=clamp))
            self.to_rgbs.append(ToRGB(c, style_dim, image_channels))
            for i in (len(self.convs) - 1, len(self.convs)):
                self.noises.register_buffer(f"noise_{i}", torch.randn(1, 1, size, size))
        self.num_layers = 1 + len(self.convs)
        #: styles of an image: one for each layer, and the one of the last ToRGB
        self.num_styles = self.num_layers + 1
        self.register_buffer("latent_avg", torch.zeros(style_dim))

    def map(self, z: Tensor, labels: Tensor | None = None, truncation: float = 1.0) -> Tensor:
        """Latents (batch, style_dim) to styles of that shape.

        truncation: the styles' distance from the average, as a factor: below 1 for fewer but more
                    typical images. The average is `latent_avg`; see `update_average`.
        """
        check_input("z", z, self.style_dim)
        if self.embed is not None:
            given = self.embed(one_hot(labels, self.num_classes, z))
            w = self.style[1:](torch.cat([pixel_norm(z), pixel_norm(given)], 1))
        elif labels is not None:
            raise ValueError("labels must be None: the model has no classes")
        else:
            w = self.style(z)
        return w if truncation == 1 else self.latent_avg.lerp(w, truncation)

    @torch.no_grad()
    def update_average(self, w: Tensor, decay: float = 0.995) -> None:
        """Moves the average style towards that of w (batch, style_dim)."""
        self.latent_avg.copy_(w.mean(0).lerp(self.latent_avg, decay))

    def forward(
        self,
        z: Tensor,
        labels: Tensor | None = None,
        *,
        mix: Tensor | None = None,
        crossover: int | None = None,
        truncation: float = 1.0,
        noise: str | Sequence[Tensor] = "random",
    ) -> Tensor:
        """Images, of about [-1, 1].

        mix:       further latents, whose styles take over from layer `crossover` on (style
                   mixing); crossover None draws it from torch's generator of the CPU.
        noise:     as for `synthesize`.
        """
        styles = self.map(z, labels, truncation).unsqueeze(1).expand(-1, self.num_styles, -1)
        if mix is not None:
            if crossover is None:
                crossover = int(torch.randint(1, self.num_styles, (), device="cpu"))
            if not 0 <= crossover <= self.num_styles:
                raise ValueError(f"crossover must be 0 to {self.num_styles}, got {crossover}")
            if mix.shape != z.shape:
                raise ValueError(f"mix must have the shape of z, got {tuple(mix.shape)}")
            second = self.map(mix, labels, truncation).unsqueeze(1)
            rest = second.expand(-1, self.num_styles - crossover, -1)
            styles = torch.cat([styles[:, :crossover], rest], 1)
        return self.synthesize(styles, noise)

    def synthesize(self, styles: Tensor, noise: str | Sequence[Tensor] = "random") -> Tensor:
        """Images of styles (batch, num_styles, style_dim).

        noise: "random", drawn anew for every image; "constant", the buffers `noises`; "none"; or
               num_layers tensors (batch or 1, 1, H, W), which may require gradients.
        """
        check_input("styles", styles, self.num_styles, self.style_dim)
        noises = self._noises(noise, styles)
        x = self.input["input"].to(styles.dtype).expand(len(styles), -1, -1, -1)
        w = styles.unbind(1)
        x = self.conv1(x, w[0], noises[0])
        image = self.to_rgb1(x, w[1], None)
        for i, to_rgb in enumerate(self.to_rgbs):
            at = 2 * i
            x = self.convs[at](x, w[at + 1], noises[at + 1])
            x = self.convs[at + 1](x, w[at + 2], noises[at + 2])
            image = to_rgb(x, w[at + 3], image)
        return image

    def _noises(self, noise: str | Sequence[Tensor], styles: Tensor) -> Sequence[Tensor | None]:
        if not isinstance(noise, str):
            if len(noise) != self.num_layers:
                raise ValueError(f"noise must be {self.num_layers} tensors, got {len(noise)}")
            return noise
        if noise == "none":
            return [None] * self.num_layers
        buffers = [getattr(self.noises, f"noise_{i}") for i in range(self.num_layers)]
        if noise == "constant":
            return buffers
        if noise != "random":
            raise ValueError(f"noise must be random, constant, none or tensors, got {noise!r}")
        return [torch.randn_like(b.expand(len(styles), -1, -1, -1)) for b in buffers]
