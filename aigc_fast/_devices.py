"""What a device does well."""

import functools

import torch

from aigc_fast import _libraries

#: asked once: a virtual machine takes 30 us to say what its processor has
_FEATURES = _libraries.features()


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def has_fast_bfloat16(device: torch.device | str) -> bool:
    """Whether bfloat16 products are many times as fast as float32's: on GPUs and on CPUs with AMX,
    whose matrix unit does 16 times as many a cycle as AVX-512 does in float32."""
    return torch.device(device).type != "cpu" or _has("amx_bf16")


def has_bfloat16_instructions() -> bool:
    """Whether this CPU multiplies bfloat16 without turning it into float32 first."""
    return _has("avx512bf16")


@functools.cache
def torch_multiplies(dtype: torch.dtype) -> bool:
    """Whether torch has products of this dtype on this CPU. Of 16 bits it has them where oneDNN
    does; else they take ten times as long as float32's, and convolutions up to 70 times."""
    asked = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }
    if dtype not in asked:
        return True
    return torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, asked[dtype])()


def _has(feature: str) -> bool:
    return _FEATURES.get(feature, False)
