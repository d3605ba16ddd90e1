"""DCGAN (Radford et al. 2015, arXiv:1511.06434) for images of 28, 32, 64 and 128 pixels.

Convolution, norm and activation stand where they stand in the sequence `main` of PyTorch's own
DCGAN example, so that weights travel in either direction; what is fused leaves an nn.Identity.
"""

from torch import Tensor, nn

from aigc_fast.nn import Conv2d, Conv2dBiasAct, ConvTranspose2d, ConvTranspose2dBiasAct
from aigc_fast.ops._checks import check_choice

from ..inputs import check_input
from ..labels import check_labels, join_labels
from .layers import LEAKY, NORMS, RELU, norm_act

#: kernels of the layers that double 4 x 4 up to that size; the one of 3 takes 4 to 7
_KERNELS = {28: (3, 4, 4), 32: (4, 4, 4), 64: (4, 4, 4, 4), 128: (4, 4, 4, 4, 4)}


class DCGANGenerator(nn.Module):
    """Latent vectors (batch, latent_dim) to images (batch, image_channels, size, size) in [-1, 1].

    size:        28, 32, 64 or 128.
    channels:    of the last hidden layer; each layer before it has twice as many as the next.
    num_classes: a conditional generator: called with labels, int64 (batch,), which join the latent
                 vector as one number a class. None for one without labels.
    """

    def __init__(
        self,
        size: int = 64,
        image_channels: int = 3,
        channels: int = 64,
        latent_dim: int = 100,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        kernels = _kernels(size)
        self.latent_dim, self.num_classes = latent_dim, num_classes
        width = channels << (len(kernels) - 1)
        layers: list[nn.Module] = [
            nn.ConvTranspose2d(latent_dim + (num_classes or 0), width, 4, bias=False),
            norm_act("batch", width, **RELU),
            nn.Identity(),
        ]
        for kernel in kernels[:-1]:
            layers += [
                ConvTranspose2d(width, width // 2, kernel, 2, 1, bias=False),
                norm_act("batch", width // 2, **RELU),
                nn.Identity(),
            ]
            width //= 2
        layers.append(
            ConvTranspose2dBiasAct(width, image_channels, kernels[-1], 2, 1, bias=False, act="tanh")
        )
        self.main = nn.Sequential(*layers)
        _initialise(self)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        check_input("latents", latents, self.latent_dim)
        return self.main(join_labels(latents, labels, self.num_classes)[:, :, None, None])


class DCGANDiscriminator(nn.Module):
    """Images (batch, image_channels, size, size) to logits (batch, 1): above zero means real.

    channels:    of the first hidden layer; each layer after it has twice as many.
    norm:        "batch" as in DCGAN. Under a gradient penalty, where each sample must be judged by
                 itself, "layer", "instance" or None; without a norm, convolutions have a bias.
    num_classes: a conditional discriminator: the logit gains the inner product of the summed
                 features and a vector of the class (Miyato & Koyama 2018, arXiv:1802.05637).
    """

    def __init__(
        self,
        size: int = 64,
        image_channels: int = 3,
        channels: int = 64,
        norm: str | None = "batch",
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        check_choice("norm", norm, NORMS)
        kernels = _kernels(size)[::-1]
        self.image_shape = image_channels, size, size
        bias = norm is None
        layers: list[nn.Module] = [
            Conv2dBiasAct(image_channels, channels, kernels[0], 2, 1, bias=bias, **LEAKY),
            nn.Identity(),
        ]
        width = channels
        for kernel in kernels[1:]:
            if norm is None:
                conv = Conv2dBiasAct(width, 2 * width, kernel, 2, 1, **LEAKY)
                layers += [conv, nn.Identity()]
            else:
                layers += [
                    Conv2d(width, 2 * width, kernel, 2, 1, bias=False),
                    norm_act(norm, 2 * width, **LEAKY),
                    nn.Identity(),
                ]
            width *= 2
        layers.append(nn.Conv2d(width, 1, 4, bias=bias))
        self.main = nn.Sequential(*layers)
        self.embed = None if num_classes is None else nn.Embedding(num_classes, width)
        _initialise(self)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        check_input("images", images, *self.image_shape)
        check_labels(labels, self.embed is not None)
        *body, head = self.main
        x = images
        for layer in body:
            x = layer(x)
        logits = head(x).flatten(1)
        if self.embed is None:
            return logits
        classes = self.embed(labels).to(x.dtype)
        return logits + (x.sum((2, 3)) * classes).sum(1, keepdim=True)


def _kernels(size: int) -> tuple[int, ...]:
    check_choice("size", size, _KERNELS)
    return _KERNELS[size]


def _initialise(network: nn.Module) -> None:
    """Normal numbers of deviation 0.02 before a norm, which hides their scale; elsewhere those
    that keep the variance through leaky ReLUs (He et al. 2015, arXiv:1502.01852)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            if module.bias is None:
                nn.init.normal_(module.weight, 0.0, 0.02)
            else:
                nn.init.kaiming_normal_(module.weight, 0.2)
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, 0.0, module.embedding_dim**-0.5)
