"""The functional API: every operator as a plain function of tensors."""

from aigc_fast import _libraries
from aigc_fast.ops.add_noise import add_noise
from aigc_fast.ops.bias_act import bias_act
from aigc_fast.ops.scheduler_step import scheduler_step

# The schemas stand; now the compiled libraries can register their kernels.
_libraries.load()

__all__ = ["add_noise", "bias_act", "scheduler_step"]
