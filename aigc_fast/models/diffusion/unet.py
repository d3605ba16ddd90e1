"""The U-Net of diffusers' UNet2DModel and UNet2DConditionModel."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from aigc_fast import ops
from aigc_fast.nn import Conv2d, GroupNormAct

from ..inputs import check_input, timesteps_of
from .attention import SpatialAttention, SpatialTransformer
from .blocks import (
    DownLevel,
    Downsample,
    MiddleLevel,
    ResnetBlock,
    TimestepMLP,
    UpLevel,
    Upsample,
)
from .load import DiffusersModel, resolve

_BOTH: dict[str, Any] = dict(
    sample_size=None,
    center_input_sample=False,
    flip_sin_to_cos=True,
    freq_shift=0,
    layers_per_block=2,
    mid_block_scale_factor=1,
    downsample_padding=1,
    dropout=0.0,
    norm_num_groups=32,
    norm_eps=1e-5,
    resnet_time_scale_shift="default",
    time_embedding_dim=None,
    num_class_embeds=None,
)
_BOTH_FIXED: dict[str, Any] = dict(time_embedding_type="positional", class_embed_type=None)
#: class of diffusers -> its options with their defaults, and what of others is supported
_PIXELS = (
    _BOTH
    | dict(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownBlock2D",) + ("AttnDownBlock2D",) * 3,
        up_block_types=("AttnUpBlock2D",) * 3 + ("UpBlock2D",),
        block_out_channels=(224, 448, 672, 896),
        act_fn="silu",
        attention_head_dim=8,
        attn_norm_num_groups=None,
        add_attention=True,
    ),
    _BOTH_FIXED
    | dict(
        mid_block_type="UNetMidBlock2D",
        downsample_type="conv",
        upsample_type="conv",
        num_train_timesteps=None,
    ),
)
_CONDITIONED = (
    _BOTH
    | dict(
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(320, 640, 1280, 1280),
        act_fn="silu",
        attention_head_dim=8,
        cross_attention_dim=1280,
        transformer_layers_per_block=1,
        use_linear_projection=False,
        upcast_attention=False,  # of the plain softmax, which nobody runs
    ),
    _BOTH_FIXED
    | dict(
        mid_block_type="UNetMidBlock2DCrossAttn",
        only_cross_attention=False,
        mid_block_only_cross_attention=None,
        reverse_transformer_layers_per_block=None,
        encoder_hid_dim=None,
        encoder_hid_dim_type=None,
        num_attention_heads=None,
        dual_cross_attention=False,
        addition_embed_type=None,
        addition_time_embed_dim=None,
        addition_embed_type_num_heads=64,
        resnet_skip_time_act=False,
        resnet_out_scale_factor=1.0,
        time_embedding_act_fn=None,
        timestep_post_act=None,
        time_cond_proj_dim=None,
        conv_in_kernel=3,
        conv_out_kernel=3,
        projection_class_embeddings_input_dim=None,
        attention_type="default",
        class_embeddings_concat=False,
        cross_attention_norm=None,
    ),
)
_CLASSES = {"UNet2DModel": _PIXELS, "UNet2DConditionModel": _CONDITIONED}


class UNet(DiffusersModel):
    """Predicts from noisy images, timesteps and, where it has them, classes or a text.

    config: what config.json of diffusers' UNet2DModel or UNet2DConditionModel says, the class
            under "_class_name"; without it "cross_attention_dim" tells. What is left out is
            diffusers' default. Names of parameters are diffusers' own.

    Not supported: Fourier and learned time embeddings, the extra embeddings of SDXL and Kandinsky,
    downsampling within residual blocks. ValueError names an option that is not supported or known.

    A batch runs fastest in channels_last; a checkpoint keeps its layout until `.to` changes it.

    >>> UNet(dict(block_out_channels=(32, 64), down_block_types=("DownBlock2D",) * 2,
    ...           up_block_types=("UpBlock2D",) * 2))
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        by_text = "cross_attention_dim" in config
        name = config.get("_class_name", "UNet2DConditionModel" if by_text else "UNet2DModel")
        if name not in _CLASSES:
            raise ValueError(f"_class_name must be one of {sorted(_CLASSES)}, got {name!r}")
        self.config = o = resolve(config, *_CLASSES[name], ("attention_head_dim",))
        if o.act_fn not in ("silu", "swish"):
            raise ValueError(f"act_fn must be 'silu', got {o.act_fn!r}")
        if o.resnet_time_scale_shift not in ("default", "scale_shift"):
            raise ValueError(
                "resnet_time_scale_shift must be 'default' or 'scale_shift', "
                f"got {o.resnet_time_scale_shift!r}"
            )
        widths = tuple(o.block_out_channels)
        dim = o.time_embedding_dim or 4 * widths[0]
        self.time_embedding = TimestepMLP(widths[0], dim)
        self.class_embedding = (
            None if o.num_class_embeds is None else nn.Embedding(o.num_class_embeds, dim)
        )
        parts = _Parts(o, widths, dim)
        self.conv_in = Conv2d(o.in_channels, widths[0], 3, padding=1)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        width, skips = widths[0], [widths[0]]
        last = len(widths) - 1
        for level, out in enumerate(widths):
            ins = [width] + [out] * (parts.layers[level] - 1)
            down = DownLevel(*parts.pairs("down", level, ins))
            skips += [out] * len(ins)
            if level < last:
                down.extend(Downsample(out, o.downsample_padding))
                skips.append(out)
            self.down_blocks.append(down)
            width = out
        self.mid_block = parts.middle(name)
        for level in range(last, -1, -1):
            ins = [width] + [widths[level]] * parts.layers[level]
            up = UpLevel(*parts.pairs("up", level, [w + skips.pop() for w in ins]))
            width = widths[level]
            if level:
                up.extend(Upsample(width))
            self.up_blocks.append(up)
        self.conv_norm_out = GroupNormAct(o.norm_num_groups, width, o.norm_eps, act="silu")
        self.conv_out = Conv2d(width, o.out_channels, 3, padding=1)

    def forward(
        self,
        sample: Tensor,
        timesteps: Tensor | float,
        labels: Tensor | None = None,
        *,
        text: Tensor | None = None,
    ) -> Tensor:
        """sample (batch, in_channels, height, width), timesteps (batch,) or a number for all of
        them, to a prediction (batch, out_channels, height, width).

        labels: int64 (batch,), for a model with classes and for no other.
        text:   (batch, tokens, cross_attention_dim), diffusers' encoder_hidden_states.
        """
        o = self.config
        check_input("sample", sample, o.in_channels, "height", "width")
        if (labels is None) != (self.class_embedding is None):
            raise ValueError("labels must be given to a model with classes, and to no other")
        time = ops.timestep_embedding(
            timesteps_of(timesteps, sample),
            self.time_embedding.linear_1.in_features,
            flip_sin_to_cos=o.flip_sin_to_cos,
            downscale_freq_shift=o.freq_shift,
        )
        embedding = self.time_embedding(time.to(sample.dtype))
        if self.class_embedding is not None:
            embedding = embedding + self.class_embedding(labels)
        embedding = F.silu(embedding)  # every block begins with it
        x = self.conv_in(2 * sample - 1 if o.center_input_sample else sample)
        skips = [x]
        for level in self.down_blocks:
            x = level(x, embedding, text, skips)
        x = self.mid_block(x, embedding, text)
        for level in self.up_blocks:
            x = level(x, embedding, text, skips)
        return self.conv_out(self.conv_norm_out(x))


class _Parts:
    """Makes the blocks of one configuration."""

    def __init__(self, options: Any, widths: tuple[int, ...], embedding_dim: int) -> None:
        self.o, self.widths, self.embedding_dim = options, widths, embedding_dim
        count = len(widths)

        def of_levels(name: str) -> tuple:
            value = getattr(options, name, None)
            values = value if isinstance(value, tuple) else (value,) * count
            if len(values) != count:
                raise ValueError(f"{name} must have {count} values, got {len(values)}")
            return values

        self.layers = of_levels("layers_per_block")
        self.kinds = {
            "down": of_levels("down_block_types"),
            "up": of_levels("up_block_types")[::-1],
        }
        self.head_sizes = of_levels("attention_head_dim")
        self.context_widths = of_levels("cross_attention_dim")
        self.transformer_layers = of_levels("transformer_layers_per_block")

    def resnet(self, in_channels: int, out_channels: int, scale: float = 1.0) -> ResnetBlock:
        o = self.o
        modulated = o.resnet_time_scale_shift == "scale_shift"
        return ResnetBlock(
            in_channels, out_channels, self.embedding_dim, o.norm_num_groups, o.norm_eps,
            modulated, o.dropout, scale,
        )  # fmt: skip

    def pairs(
        self, way: str, level: int, in_channels: list[int]
    ) -> tuple[list[ResnetBlock], list[nn.Module]]:
        """The residual blocks of a level, and what attends after each of them."""
        width, kind = self.widths[level], self.kinds[way][level]
        resnets = [self.resnet(channels, width) for channels in in_channels]
        text = self.context_widths[level] is not None
        makers = {
            f"{way.title()}Block2D": None,
            **({} if text else {f"Attn{way.title()}Block2D": self.spatial}),
            **({f"CrossAttn{way.title()}Block2D": self.transformer} if text else {}),
        }
        if kind not in makers:
            raise ValueError(f"{way}_block_types must be among {sorted(makers)}, got {kind!r}")
        make = makers[kind]
        return resnets, [] if make is None else [make(level) for _ in resnets]

    def spatial(self, level: int) -> SpatialAttention:
        o, width = self.o, self.widths[level]
        heads = width // (self.head_sizes[level] or width)
        return SpatialAttention(width, heads, o.norm_num_groups, o.norm_eps)

    def transformer(self, level: int) -> SpatialTransformer:
        return SpatialTransformer(
            self.widths[level],
            self.head_sizes[level],  # a misnomer of diffusers: here it is the number of heads
            self.transformer_layers[level],
            self.context_widths[level],
            self.o.norm_num_groups,
            self.o.use_linear_projection,
        )

    def middle(self, name: str) -> MiddleLevel:
        o, width = self.o, self.widths[-1]
        scale = o.mid_block_scale_factor
        resnets = [self.resnet(width, width, scale) for _ in range(2)]
        if name == "UNet2DConditionModel":
            return MiddleLevel(resnets, [self.transformer(-1)])
        if not o.add_attention:
            return MiddleLevel(resnets, [])
        plain = o.norm_num_groups if o.resnet_time_scale_shift == "default" else None
        groups = plain if o.attn_norm_num_groups is None else o.attn_norm_num_groups
        heads = width // (self.head_sizes[-1] or width)
        return MiddleLevel(resnets, [SpatialAttention(width, heads, groups, o.norm_eps, scale)])
