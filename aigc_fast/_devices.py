"""What a device does well."""

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


def has_float16_instructions() -> bool:
    """The same of float16. Where it has none, torch's convolutions take up to 70 times as long."""
    return _has("avx512fp16")


def _has(feature: str) -> bool:
    return _FEATURES.get(feature, False)
