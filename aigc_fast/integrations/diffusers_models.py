"""What takes the place of what in the models of diffusers: the table, its U-Nets and autoencoders.

Layers, attention with rotary embedding and transformer blocks have files of their own.
"""

from collections.abc import Iterable
from typing import Any

from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from aigc_fast import ops
from aigc_fast.integrations import _packed
from aigc_fast.integrations import diffusers_attention as attention
from aigc_fast.integrations import diffusers_blocks as blocks
from aigc_fast.integrations import diffusers_layers as layers
from aigc_fast.integrations._patching import (
    Assignment,
    Frozen,
    Replacement,
    Unfit,
    become,
    check_as_written,
    stock_class,
)
from aigc_fast.integrations.diffusers_layers import GroupNorm, check_group_norm, group_norm
from aigc_fast.nn._replacing import runs_as_written
from aigc_fast.nn.group_norm_act import modulated_group_norm_act


def activation_of(module: nn.Module) -> str:
    """Its name in `ops.group_norm_act`; Unfit where that has none."""
    if type(module) is nn.SiLU:
        return "silu"
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    raise Unfit(f"its activation is {type(module).__name__}")


class HasGroupNorm(Replacement):
    """A module whose own work stays, with a group norm that no activation follows."""

    uses = "group_norm_act in its norm"

    @classmethod
    def assignments(cls, module: Any) -> Iterable[Assignment]:
        if getattr(module, "norm", None) is None:
            raise Unfit("it has no group norm")
        check_group_norm(module.norm)
        yield become(GroupNorm, module.norm)


class NormThenSiLU(Replacement):
    """A group norm that does the work of the SiLU after it too."""

    uses = "group_norm_act"
    weight: Tensor

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype != self.weight.dtype:
            return nn.functional.silu(super().forward(input))
        return group_norm(self, input, "silu")


class DoneBefore(Replacement):
    """The SiLU whose work the norm before it does."""

    uses = "group_norm_act, of the norm before it"

    def forward(self, input: Tensor) -> Tensor:
        return input


class HasOutputNorm(Replacement):
    """A U-Net, or half of an autoencoder: norm and activation before its last convolution."""

    uses = "group_norm_act in its output"

    @classmethod
    def assignments(cls, module: Any) -> Iterable[Assignment]:
        norm, act = module.conv_norm_out, module.conv_act
        check_group_norm(norm)
        for name in ("conv_norm_out", "conv_act"):  # their hooks would see other tensors
            check_as_written(module, name)
        if not isinstance(act, nn.SiLU):
            raise Unfit(f"its activation is {type(act).__name__}")
        yield from (become(NormThenSiLU, norm), become(DoneBefore, act))


class ResnetBlock(Replacement):
    uses = "group_norm_act"
    absorbs = ("norm1", "norm2", "nonlinearity")

    @classmethod
    def assignments(cls, module: Any) -> Iterable[Assignment]:
        activation_of(module.nonlinearity)
        for norm in (module.norm1, module.norm2):
            check_group_norm(norm)
        if module.up or module.down:
            raise Unfit("it changes the resolution")
        if module.time_embedding_norm not in ("default", "scale_shift"):
            raise Unfit(f"its time embedding is {module.time_embedding_norm}")
        yield from super().assignments(module)

    def forward(
        self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if input_tensor.dtype != self.norm1.weight.dtype:
            return super().forward(input_tensor, temb, *args, **kwargs)
        activation = activation_of(self.nonlinearity)
        hidden = self.conv1(group_norm(self.norm1, input_tensor, activation))
        if self.time_emb_proj is not None:
            assert temb is not None
            temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        if self.time_embedding_norm == "scale_shift":
            assert temb is not None
            scale, shift = temb.chunk(2, dim=1)
            hidden = modulated_group_norm_act(self.norm2, hidden, scale, shift, activation)
        else:
            if temb is not None:
                hidden = hidden + temb[:, :, None, None]
            hidden = group_norm(self.norm2, hidden, activation)
        hidden = self.conv2(self.dropout(hidden))
        if self.conv_shortcut is not None:
            if self.training:  # as in diffusers, for the strides of gradients
                input_tensor = input_tensor.contiguous()
            input_tensor = self.conv_shortcut(input_tensor)
        output = input_tensor + hidden
        return output if self.output_scale_factor == 1 else output / self.output_scale_factor


class Upsample(Replacement):
    uses = "upsample_conv2d"

    @classmethod
    def assignments(cls, module: Any) -> Iterable[Assignment]:
        if module.norm is not None or module.use_conv_transpose or not module.interpolate:
            raise Unfit("it is no nearest upsampling")
        if not module.use_conv:
            raise Unfit("no convolution follows it")
        yield from super().assignments(module)

    def forward(
        self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        conv = self.conv if self.name == "conv" else self.Conv2d_0
        # An adapter's convolution is of a class of its own.
        if output_size is not None or args or kwargs or not _is_plain(conv):
            return super().forward(hidden_states, output_size, *args, **kwargs)
        return self.upsample(conv, hidden_states)

    def upsample(self, conv: Any, x: Tensor) -> Tensor:
        return ops.upsample_conv2d(x, conv.weight, conv.bias)


class FrozenUpsample(Frozen, Upsample):
    uses = "upsample_conv2d, its weight packed once"

    @classmethod
    def assignments(cls, module: Any) -> Iterable[Assignment]:
        yield from super().assignments(module)
        yield Assignment(module, "_packed", _packed.Packed(_packed.pack_upsampling))

    def upsample(self, conv: Any, x: Tensor) -> Tensor:
        y = _packed.upsample(conv, self._packed, x)
        return super().upsample(conv, x) if y is None else y


Upsample.frozen = FrozenUpsample


def _is_plain(conv: Any) -> bool:
    """Whether it is torch's own convolution with "same" padding, and nobody's hook is on it."""
    same = tuple(size // 2 for size in conv.kernel_size)
    return (
        stock_class(conv) is nn.Conv2d
        and (conv.padding, conv.stride, conv.dilation, conv.groups) == (same, (1, 1), (1, 1), 1)
        and all(size % 2 for size in conv.kernel_size)
        and conv.padding_mode == "zeros"
        and runs_as_written(conv)
    )


def _table(**modules: dict[str, type[Replacement]]) -> dict[str, type[Replacement]]:
    return {
        f"diffusers.models.{name.replace('__', '.')}.{cls}": replacement
        for name, rows in modules.items()
        for cls, replacement in rows.items()
    }


#: module: class -> what takes its place
TABLE = _table(
    resnet=dict(ResnetBlock2D=ResnetBlock),
    upsampling=dict(Upsample2D=Upsample),
    unets__unet_2d=dict(UNet2DModel=HasOutputNorm),
    unets__unet_2d_condition=dict(UNet2DConditionModel=HasOutputNorm),
    autoencoders__vae=dict(Encoder=HasOutputNorm, Decoder=HasOutputNorm),
    autoencoders__autoencoder_kl_wan=dict(WanCausalConv3d=layers.CausalConv3d),
    autoencoders__autoencoder_kl_qwenimage=dict(QwenImageCausalConv3d=layers.CausalConv3d),
    attention_processor=dict(Attention=attention.Attention),
    embeddings=dict(Timesteps=layers.Timesteps),
    activations=dict(GEGLU=layers.GEGLU, GELU=layers.GELU, SwiGLU=layers.SwiGLU),
    normalization=dict(
        RMSNorm=layers.RMSNorm,
        FP32LayerNorm=layers.FP32LayerNorm,
        AdaLayerNormZero=blocks.AdaLayerNormZero,
        AdaLayerNormZeroSingle=blocks.AdaLayerNormZeroSingle,
        SD35AdaLayerNormZeroX=blocks.SD35AdaLayerNormZeroX,
        AdaLayerNormContinuous=blocks.AdaLayerNormContinuous,
    ),
    attention=dict(
        BasicTransformerBlock=blocks.DiTBlock,
        JointTransformerBlock=blocks.SD3Block,
    ),
    transformers__transformer_2d=dict(Transformer2DModel=HasGroupNorm),
    transformers__transformer_flux=dict(
        FluxAttention=attention.FluxAttention,
        FluxTransformerBlock=blocks.FluxBlock,
        FluxSingleTransformerBlock=blocks.FluxSingleBlock,
    ),
    transformers__transformer_wan=dict(
        WanAttention=attention.WanAttention, WanTransformerBlock=blocks.WanBlock
    ),
)

#: base -> what takes the place of every class derived from it, where no row of TABLE does
FAMILIES = {Attention: attention.AnyAttention, AttentionModuleMixin: attention.AnyAttention}
#: A model is known by the classes inside it.
MODELS = ()


def rows_of(cls: type) -> list[type[Replacement]]:
    """What may take the place of a class, the best first."""
    row = TABLE.get(f"{cls.__module__}.{cls.__qualname__}")
    rows = [row, *(of for base, of in FAMILIES.items() if issubclass(cls, base))]
    return [found for found in rows if found is not None]
