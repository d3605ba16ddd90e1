"""The table of samples: for every operator the calls that matter and the calls it must refuse.

One file per stem; the generic tests (tests/ops/test_every_op.py) and the benchmarks read OPS.
"""

from tests.op_samples import (
    add_noise,
    alias_free_snake,
    bias_act,
    conv3x3,
    cross_entropy,
    decode_attention,
    diffusion_loss,
    elbo,
    filtered_lrelu,
    gan_loss,
    gated_mlp,
    group_norm_act,
    kv_cache,
    layer_norm,
    norm_act,
    optim,
    qk_norm_rotary,
    quantized_linear,
    rms_norm,
    rotary,
    sampling,
    scale_bias_act,
    scheduler_step,
    snake,
    spectral_norm,
    timestep_embedding,
    upfirdn2d,
    vector_quantize,
)
from tests.op_samples.sample import OpSamples, Refusal, Sample, channels_last, rand

OPS: dict[str, OpSamples] = {
    **bias_act.OPS,
    **conv3x3.OPS,
    **upfirdn2d.OPS,
    **scale_bias_act.OPS,
    **filtered_lrelu.OPS,
    **spectral_norm.OPS,
    **rms_norm.OPS,
    **gated_mlp.OPS,
    **rotary.OPS,
    **qk_norm_rotary.OPS,
    **kv_cache.OPS,
    **quantized_linear.OPS,
    **decode_attention.OPS,
    **sampling.OPS,
    **cross_entropy.OPS,
    **scheduler_step.OPS,
    **add_noise.OPS,
    **diffusion_loss.OPS,
    **elbo.OPS,
    **group_norm_act.OPS,
    **layer_norm.OPS,
    **snake.OPS,
    **norm_act.OPS,
    **gan_loss.OPS,
    **optim.OPS,
    **timestep_embedding.OPS,
    **alias_free_snake.OPS,
    **vector_quantize.OPS,
}

__all__ = ["OPS", "OpSamples", "Refusal", "Sample", "channels_last", "rand"]
