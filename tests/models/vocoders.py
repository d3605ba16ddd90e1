"""Small generators of both kinds."""

import torch

from aigc_fast.models.vocoder import BigVGANGenerator, HiFiGANGenerator

SMALL = dict(
    upsample_rates=(4, 2),
    upsample_kernel_sizes=(8, 4),
    upsample_initial_channel=16,
    resblock_kernel_sizes=(3, 7),
    resblock_dilation_sizes=((1, 3, 5), (1, 2, 4)),
)
#: name -> the class, and the options that its config.json must have
GENERATORS = {
    "hifigan": (HiFiGANGenerator, SMALL),
    "bigvgan": (BigVGANGenerator, SMALL | dict(activation="snakebeta", snake_logscale=True)),
}


def make(name, **options):
    """A generator, the activations of BigVGAN differing from channel to channel, and its filters
    from the usual ones in one of them."""
    cls, own = GENERATORS[name]
    model = cls(**own | dict(in_channels=6) | options).eval()
    if name == "bigvgan":
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if ".act." in key:
                    parameter.uniform_(0.3, 1.5)
            model.activation_post.downsample["lowpass"].filter.mul_(torch.rand(12) + 0.5)
    return model
