"""The table of samples: for every operator the calls that matter and the calls it must refuse.

One file per stem; the generic tests (tests/ops/test_every_op.py) and the benchmarks read OPS.
"""

from tests.op_samples import bias_act, decode_attention
from tests.op_samples.sample import OpSamples, Refusal, Sample, channels_last, rand

OPS: dict[str, OpSamples] = {
    **bias_act.OPS,
    **decode_attention.OPS,
}

__all__ = ["OPS", "OpSamples", "Refusal", "Sample", "channels_last", "rand"]
