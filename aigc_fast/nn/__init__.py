"""nn.Module twins of the operators; the names in their state dicts are torch's own."""

from .bias_act import BiasAct, LinearBiasAct
from .gated_mlp import SwiGLU
from .quantized_linear import QuantizedLinear
from .rms_norm import RMSNorm

__all__ = ["BiasAct", "LinearBiasAct", "QuantizedLinear", "RMSNorm", "SwiGLU"]
