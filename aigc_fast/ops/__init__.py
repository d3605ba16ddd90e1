"""The functional API: every operator as a plain function of tensors."""

from aigc_fast import _libraries
from aigc_fast.ops.bias_act import bias_act
from aigc_fast.ops.decode_attention import decode_attention

# The schemas stand; now the compiled libraries can register their kernels.
_libraries.load()

__all__ = ["bias_act", "decode_attention"]
