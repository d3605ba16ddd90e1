"""The table of samples: for every operator the calls that matter and the calls it must refuse.

One file per stem; the generic tests (tests/ops/test_every_op.py) and the benchmarks read OPS.
"""

from tests.op_samples import add_noise, bias_act, scheduler_step
from tests.op_samples.sample import OpSamples, Refusal, Sample, channels_last, rand

OPS: dict[str, OpSamples] = {
    **add_noise.OPS,
    **bias_act.OPS,
    **scheduler_step.OPS,
}

__all__ = ["OPS", "OpSamples", "Refusal", "Sample", "channels_last", "rand"]
