"""nn.Module twins of the operators; the names in their state dicts are torch's own."""

from .batch_norm_act import BatchNormAct1d, BatchNormAct2d
from .bias_act import BiasAct, LinearBiasAct
from .gated_mlp import GEGLU, SwiGLU
from .quantized_linear import QuantizedLinear
from .rms_norm import RMSNorm
from .upfirdn2d import Blur, Downsample2d, Upsample2d

__all__ = [
    "GEGLU",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BiasAct",
    "Blur",
    "Downsample2d",
    "LinearBiasAct",
    "QuantizedLinear",
    "RMSNorm",
    "SwiGLU",
    "Upsample2d",
]
