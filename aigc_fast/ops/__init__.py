"""The functional API: every operator as a plain function of tensors."""

from aigc_fast import _libraries
from aigc_fast.ops import _public
from aigc_fast.ops._quantized_format import dequantize_weight, pack_weight, quantize_weight
from aigc_fast.ops.add_noise import add_noise
from aigc_fast.ops.alias_free_snake import alias_free_snake
from aigc_fast.ops.bias_act import bias_act
from aigc_fast.ops.causal_conv3d import causal_conv3d
from aigc_fast.ops.channel_moments import channel_moments
from aigc_fast.ops.codebook_moments import codebook_moments
from aigc_fast.ops.conv1d import conv1d, conv_transpose1d
from aigc_fast.ops.conv2d import conv2d, conv_transpose2d
from aigc_fast.ops.conv3x3 import conv3x3
from aigc_fast.ops.cross_entropy import cross_entropy
from aigc_fast.ops.decode_attention import decode_attention
from aigc_fast.ops.decoder_step import decoder_step
from aigc_fast.ops.diffusion_loss import diffusion_loss
from aigc_fast.ops.elbo import reconstruction_loss, sample_gaussian
from aigc_fast.ops.filtered_lrelu import filtered_lrelu
from aigc_fast.ops.gan_loss import discriminator_loss, generator_loss
from aigc_fast.ops.gated_mlp import geglu, swiglu
from aigc_fast.ops.gated_residual import gated_residual, gated_residual_norm
from aigc_fast.ops.gelu import gelu
from aigc_fast.ops.group_norm_act import group_norm_act
from aigc_fast.ops.grouped_linear import grouped_linear
from aigc_fast.ops.kv_cache import append_kv
from aigc_fast.ops.layer_norm import layer_norm, modulated_layer_norm, modulated_rms_norm
from aigc_fast.ops.linear import linear
from aigc_fast.ops.linear_cross_entropy import linear_cross_entropy
from aigc_fast.ops.merge_attention import merge_attention
from aigc_fast.ops.modulated_conv2d import conv2d_resample, modulated_conv2d
from aigc_fast.ops.norm_act import (
    adaptive_instance_norm,
    batch_norm_act,
    instance_norm_act,
    pixel_norm_act,
)
from aigc_fast.ops.optim import adam_step, gradient_norm
from aigc_fast.ops.pointwise_program import pointwise_program
from aigc_fast.ops.qk_norm_rotary import qk_norm_rotary
from aigc_fast.ops.quantized_linear import quantized_linear
from aigc_fast.ops.rms_norm import add_rms_norm, rms_norm
from aigc_fast.ops.rotary import apply_rotary
from aigc_fast.ops.sampling import sample_tokens
from aigc_fast.ops.scale_bias_act import scale_bias_act
from aigc_fast.ops.scaled_dot_product_attention import scaled_dot_product_attention
from aigc_fast.ops.scheduler_step import scheduler_step
from aigc_fast.ops.snake import snake
from aigc_fast.ops.spectral_norm import spectral_norm
from aigc_fast.ops.timestep_embedding import timestep_embedding
from aigc_fast.ops.upfirdn2d import upfirdn2d
from aigc_fast.ops.upsample_conv2d import upsample_conv2d
from aigc_fast.ops.vector_quantize import vector_quantize

# The schemas stand; now the compiled libraries can register their kernels.
_libraries.load()

__all__ = [
    "adam_step",
    "adaptive_instance_norm",
    "add_noise",
    "add_rms_norm",
    "alias_free_snake",
    "append_kv",
    "apply_rotary",
    "batch_norm_act",
    "bias_act",
    "causal_conv3d",
    "channel_moments",
    "codebook_moments",
    "conv1d",
    "conv2d",
    "conv2d_resample",
    "conv3x3",
    "conv_transpose1d",
    "conv_transpose2d",
    "cross_entropy",
    "decode_attention",
    "decoder_step",
    "dequantize_weight",
    "diffusion_loss",
    "discriminator_loss",
    "filtered_lrelu",
    "gated_residual",
    "gated_residual_norm",
    "geglu",
    "gelu",
    "generator_loss",
    "gradient_norm",
    "group_norm_act",
    "grouped_linear",
    "instance_norm_act",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "merge_attention",
    "modulated_conv2d",
    "modulated_layer_norm",
    "modulated_rms_norm",
    "pack_weight",
    "pixel_norm_act",
    "pointwise_program",
    "qk_norm_rotary",
    "quantize_weight",
    "quantized_linear",
    "reconstruction_loss",
    "rms_norm",
    "sample_gaussian",
    "sample_tokens",
    "scale_bias_act",
    "scaled_dot_product_attention",
    "scheduler_step",
    "snake",
    "spectral_norm",
    "swiglu",
    "timestep_embedding",
    "upfirdn2d",
    "upsample_conv2d",
    "vector_quantize",
]

# As users call them; the modules call one another without the words for wrong types.
globals().update({name: _public.publish(globals()[name]) for name in __all__})
