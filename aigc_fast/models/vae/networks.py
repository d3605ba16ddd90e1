"""Encoder and decoder of diffusers' autoencoders; modules are named as diffusers names them."""

from typing import Any

from torch import Tensor, nn

from aigc_fast.models.diffusion.attention import SpatialAttention
from aigc_fast.models.diffusion.blocks import (
    DownLevel,
    Downsample,
    MiddleLevel,
    ResnetBlock,
    UpLevel,
    Upsample,
)
from aigc_fast.nn import Conv2d, GroupNormAct

#: options of diffusers that both networks read, with their defaults
OPTIONS: dict[str, Any] = dict(
    in_channels=3,
    out_channels=3,
    down_block_types=("DownEncoderBlock2D",),
    up_block_types=("UpDecoderBlock2D",),
    block_out_channels=(64,),
    layers_per_block=1,
    act_fn="silu",
    norm_num_groups=32,
    mid_block_add_attention=True,
    sample_size=32,  # these two have no effect on what is computed
    force_upcast=True,
)
_EPS = 1e-6


def check(options: Any) -> None:
    """ValueError for blocks and activations that the networks do not have."""
    o = options
    if o.act_fn not in ("silu", "swish"):
        raise ValueError(f"act_fn must be 'silu', got {o.act_fn!r}")
    levels = len(o.block_out_channels)
    if not levels:
        raise ValueError("block_out_channels must not be empty")
    for name, kind in (("down", "DownEncoderBlock2D"), ("up", "UpDecoderBlock2D")):
        found = getattr(o, f"{name}_block_types")
        if found != (kind,) * levels:
            raise ValueError(
                f"{name}_block_types must be {kind!r} for each of the {levels} "
                f"block_out_channels, got {found}"
            )


class Encoder(nn.Module):
    """Images to features of latents, half the size with every level but the last."""

    def __init__(self, options: Any, out_channels: int) -> None:
        super().__init__()
        o, widths = options, options.block_out_channels
        last = len(widths) - 1
        self.conv_in = Conv2d(o.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        width = widths[0]
        for level, out in enumerate(widths):
            ins = [width] + [out] * (o.layers_per_block - 1)
            down = DownLevel([_resnet(o, i, out) for i in ins], [])
            if level < last:
                down.extend(Downsample(out, padding=0))
            self.down_blocks.append(down)
            width = out
        self.mid_block = _middle(o, width)
        self.conv_norm_out = GroupNormAct(o.norm_num_groups, width, _EPS, act="silu")
        self.conv_out = Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(self.conv_norm_out(self.mid_block(x)))


class Decoder(nn.Module):
    """Latents to images, twice the size with every level but the last."""

    def __init__(self, options: Any) -> None:
        super().__init__()
        o, widths = options, options.block_out_channels
        width = widths[-1]
        self.conv_in = Conv2d(o.latent_channels, width, 3, padding=1)
        self.mid_block = _middle(o, width)
        self.up_blocks = nn.ModuleList()
        for level, out in reversed(list(enumerate(widths))):
            ins = [width] + [out] * o.layers_per_block
            up = UpLevel([_resnet(o, i, out) for i in ins], [])
            if level:
                up.extend(Upsample(out))
            self.up_blocks.append(up)
            width = out
        self.conv_norm_out = GroupNormAct(o.norm_num_groups, width, _EPS, act="silu")
        self.conv_out = Conv2d(width, o.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(self.conv_norm_out(x))


def _resnet(options: Any, in_channels: int, out_channels: int) -> ResnetBlock:
    return ResnetBlock(in_channels, out_channels, None, options.norm_num_groups, _EPS)


def _middle(options: Any, width: int) -> MiddleLevel:
    attention = SpatialAttention(width, 1, options.norm_num_groups, _EPS)
    return MiddleLevel(
        [_resnet(options, width, width) for _ in range(2)],
        [attention] if options.mid_block_add_attention else [],
    )
