"""The table of samples: for every operator the calls that matter and the calls it must refuse.

One file per stem; the generic tests (tests/ops/test_every_op.py) and the benchmarks read OPS.
"""

from tests.op_samples import (
    add_noise,
    bias_act,
    decode_attention,
    gan_loss,
    gated_mlp,
    group_norm_act,
    kv_cache,
    layer_norm,
    optim,
    qk_norm_rotary,
    quantized_linear,
    rms_norm,
    rotary,
    sampling,
    scheduler_step,
    timestep_embedding,
    upfirdn2d,
)
from tests.op_samples.sample import OpSamples, Refusal, Sample, channels_last, rand

OPS: dict[str, OpSamples] = {
    **bias_act.OPS,
    **upfirdn2d.OPS,
    **rms_norm.OPS,
    **gated_mlp.OPS,
    **rotary.OPS,
    **qk_norm_rotary.OPS,
    **kv_cache.OPS,
    **quantized_linear.OPS,
    **decode_attention.OPS,
    **sampling.OPS,
    **scheduler_step.OPS,
    **add_noise.OPS,
    **group_norm_act.OPS,
    **layer_norm.OPS,
    **gan_loss.OPS,
    **optim.OPS,
    **timestep_embedding.OPS,
}

__all__ = ["OPS", "OpSamples", "Refusal", "Sample", "channels_last", "rand"]
