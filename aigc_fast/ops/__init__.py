"""The functional API: every operator as a plain function of tensors."""

from aigc_fast import _libraries
from aigc_fast.ops._quantized_format import dequantize_weight, pack_weight, quantize_weight
from aigc_fast.ops.add_noise import add_noise
from aigc_fast.ops.bias_act import bias_act
from aigc_fast.ops.decode_attention import decode_attention
from aigc_fast.ops.decoder_step import decoder_step
from aigc_fast.ops.gan_loss import discriminator_loss, generator_loss
from aigc_fast.ops.gated_mlp import geglu, swiglu
from aigc_fast.ops.gated_residual import gated_residual, gated_residual_norm
from aigc_fast.ops.group_norm_act import group_norm_act
from aigc_fast.ops.kv_cache import append_kv
from aigc_fast.ops.layer_norm import layer_norm, modulated_layer_norm, modulated_rms_norm
from aigc_fast.ops.merge_attention import merge_attention
from aigc_fast.ops.optim import adam_step, gradient_norm
from aigc_fast.ops.qk_norm_rotary import qk_norm_rotary
from aigc_fast.ops.quantized_linear import quantized_linear
from aigc_fast.ops.rms_norm import add_rms_norm, rms_norm
from aigc_fast.ops.rotary import apply_rotary
from aigc_fast.ops.sampling import sample_tokens
from aigc_fast.ops.scheduler_step import scheduler_step
from aigc_fast.ops.timestep_embedding import timestep_embedding
from aigc_fast.ops.upfirdn2d import upfirdn2d

# The schemas stand; now the compiled libraries can register their kernels.
_libraries.load()

__all__ = [
    "adam_step",
    "add_noise",
    "add_rms_norm",
    "append_kv",
    "apply_rotary",
    "bias_act",
    "decode_attention",
    "decoder_step",
    "dequantize_weight",
    "discriminator_loss",
    "gated_residual",
    "gated_residual_norm",
    "geglu",
    "generator_loss",
    "gradient_norm",
    "group_norm_act",
    "layer_norm",
    "merge_attention",
    "modulated_layer_norm",
    "modulated_rms_norm",
    "pack_weight",
    "qk_norm_rotary",
    "quantize_weight",
    "quantized_linear",
    "rms_norm",
    "sample_tokens",
    "scheduler_step",
    "swiglu",
    "timestep_embedding",
    "upfirdn2d",
]
