"""nn.Module twins of the operators; the names in their state dicts are torch's own."""

from .bias_act import BiasAct, LinearBiasAct
from .conv_bias_act import Conv2dBiasAct, ConvTranspose2dBiasAct
from .gated_mlp import GEGLU, SwiGLU
from .group_norm_act import GroupNormAct, ModulatedGroupNormAct
from .layer_norm import LayerNorm, ModulatedLayerNorm, ModulatedRMSNorm
from .quantized_linear import QuantizedLinear
from .rms_norm import RMSNorm
from .upfirdn2d import Blur, Downsample2d, Upsample2d

__all__ = [
    "GEGLU",
    "BiasAct",
    "Blur",
    "Conv2dBiasAct",
    "ConvTranspose2dBiasAct",
    "Downsample2d",
    "GroupNormAct",
    "LayerNorm",
    "LinearBiasAct",
    "ModulatedGroupNormAct",
    "ModulatedLayerNorm",
    "ModulatedRMSNorm",
    "QuantizedLinear",
    "RMSNorm",
    "SwiGLU",
    "Upsample2d",
]
