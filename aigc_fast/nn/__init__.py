"""nn.Module twins of the operators; the names in their state dicts are torch's own.

Tracers: torch.compile and torch.export see into them. torch.fx takes them as leaves, which a tracer
of yours says in `is_leaf_module` (`type(module).__module__.startswith("aigc_fast.nn")`), as torch's
own does of torch.nn. torch.jit.trace takes them under torch.no_grad(): in a graph for gradients it
finds autograd Functions, which it can neither check nor save.
"""

from ._arguments import check_constructor
from .bias_act import BiasAct, LinearBiasAct
from .causal_conv3d import CausalConv3d
from .conv2d import Conv2d, ConvTranspose2d
from .conv_bias_act import Conv2dBiasAct, ConvTranspose2dBiasAct
from .equalized import EqualizedConv2d, EqualizedLinear
from .fusion import fold_batch_norm, fuse, unfuse
from .gated_mlp import GEGLU, SwiGLU
from .group_norm_act import GroupNormAct, ModulatedGroupNormAct
from .layer_norm import LayerNorm, ModulatedLayerNorm, ModulatedRMSNorm
from .linear import Linear
from .modulated_conv2d import ModulatedConv2d
from .norm_act import (
    AdaptiveInstanceNorm,
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    InstanceNormAct,
    MinibatchStddev,
    PixelNormAct,
    SyncBatchNormAct,
)
from .quantized_linear import QuantizedLinear
from .rms_norm import RMSNorm
from .snake import AliasFreeSnake, Snake, SnakeBeta
from .spectral_norm import remove_spectral_norm, spectral_norm
from .upfirdn2d import Blur, Downsample2d, Upsample2d
from .vector_quantizer import VectorQuantizer

__all__ = [
    "GEGLU",
    "AdaptiveInstanceNorm",
    "AliasFreeSnake",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "BiasAct",
    "Blur",
    "CausalConv3d",
    "Conv2d",
    "Conv2dBiasAct",
    "ConvTranspose2d",
    "ConvTranspose2dBiasAct",
    "Downsample2d",
    "EqualizedConv2d",
    "EqualizedLinear",
    "GroupNormAct",
    "InstanceNormAct",
    "LayerNorm",
    "Linear",
    "LinearBiasAct",
    "MinibatchStddev",
    "ModulatedConv2d",
    "ModulatedGroupNormAct",
    "ModulatedLayerNorm",
    "ModulatedRMSNorm",
    "PixelNormAct",
    "QuantizedLinear",
    "RMSNorm",
    "Snake",
    "SnakeBeta",
    "SwiGLU",
    "SyncBatchNormAct",
    "Upsample2d",
    "VectorQuantizer",
    "fold_batch_norm",
    "fuse",
    "remove_spectral_norm",
    "spectral_norm",
    "unfuse",
]

for _name in __all__:
    if isinstance(globals()[_name], type):
        check_constructor(globals()[_name])
