"""A GAN of fully connected layers; every bias and activation is one pass.

Both networks are sequences whose state dict is that of the plain torch sequence
Linear, activation, Linear, activation, ...: weights travel in either direction.
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from aigc_fast.nn import Linear, LinearBiasAct

from ..inputs import check_input


def _leaky(in_features: int, out_features: int) -> nn.Module:
    return LinearBiasAct(in_features, out_features, "lrelu", alpha=0.2, gain=1.0)


def _numbered(layers: Sequence[nn.Module]) -> OrderedDict[str, nn.Module]:
    """0, 2, 4, ...: the odd numbers are the activations of the plain sequence."""
    return OrderedDict((str(2 * i), layer) for i, layer in enumerate(layers))


class MLPGenerator(nn.Sequential):
    """Latent vectors (batch, sizes[0]) to images (batch, sizes[-1]) in [-1, 1]."""

    def __init__(self, sizes: Sequence[int] = (100, 256, 512, 1024, 784)) -> None:
        hidden = [_leaky(a, b) for a, b in pairwise(sizes[:-1])]
        super().__init__(_numbered([*hidden, LinearBiasAct(sizes[-2], sizes[-1], "tanh")]))
        self.latent_dim = sizes[0]

    def forward(self, latents: Tensor) -> Tensor:
        check_input("latents", latents, self.latent_dim)
        return super().forward(latents)


class MLPDiscriminator(nn.Sequential):
    """Images (batch, sizes[0]) to logits (batch, sizes[-1]): above zero means real."""

    def __init__(self, sizes: Sequence[int] = (784, 1024, 512, 256, 1)) -> None:
        hidden = [_leaky(a, b) for a, b in pairwise(sizes[:-1])]
        super().__init__(_numbered([*hidden, Linear(sizes[-2], sizes[-1])]))
        self.in_features = sizes[0]

    def forward(self, images: Tensor) -> Tensor:
        check_input("images", images, self.in_features)
        return super().forward(images)
