"""Sizes and scales as files and callers give them."""

from collections.abc import Sequence
from math import inf
from typing import Any

#: no size of a vocoder is larger; a file that says so is not sound
LARGEST = 1 << 16


def check_size(name: str, value: Any, at_least: int = 1) -> int:
    """The value, if it is an integer from `at_least` to `LARGEST`."""
    if type(value) is not int or not at_least <= value <= LARGEST:
        raise ValueError(f"{name} must be an integer in [{at_least}, {LARGEST}], got {value!r}")
    return value


def _check_sizes(name: str, values: Any) -> None:
    if not isinstance(values, Sequence) or isinstance(values, str) or not 1 <= len(values) <= 64:
        raise ValueError(f"{name} must be a sequence of 1 to 64 sizes, got {values!r:.80}")
    for value in values:
        check_size(f"{name}, each", value)


def check_rates(rates: Any, kernels: Any) -> None:
    """Of upsampling: ValueError where the result would not be `rate` times as long."""
    _check_sizes("upsample_rates", rates)
    _check_sizes("upsample_kernel_sizes", kernels)
    fit = len(kernels) == len(rates)
    if not fit or any(k < r or (k - r) % 2 for k, r in zip(kernels, rates, strict=True)):
        raise ValueError(
            "upsample_kernel_sizes must have for each of upsample_rates the rate plus 0 or an "
            f"even number, got {kernels!r} for {rates!r}"
        )


def check_blocks(resblock: Any, kernels: Any, dilations: Any) -> None:
    """Of residual blocks: their kind, and a kernel with its dilations for each."""
    if resblock not in ("1", "2"):
        raise ValueError(f'resblock must be "1" or "2", got {resblock!r}')
    _check_sizes("resblock_kernel_sizes", kernels)
    if any(kernel % 2 == 0 for kernel in kernels):
        raise ValueError(f"resblock_kernel_sizes must be odd, got {kernels!r}")
    if not isinstance(dilations, Sequence) or len(dilations) != len(kernels):
        raise ValueError(
            f"resblock_dilation_sizes must have one sequence for each of resblock_kernel_sizes, "
            f"got {dilations!r}"
        )
    for sizes in dilations:
        _check_sizes("resblock_dilation_sizes, each", sizes)


def check_scale(name: str, value: Any) -> float:
    """The value, if it is a finite number, not negative, and for lengths not 0."""
    number = type(value) in (int, float) and 0 <= value < inf
    if not number or (name == "length_scale" and not value):
        kind = "positive" if name == "length_scale" else "at least 0"
        raise ValueError(f"{name} must be finite and {kind}, got {value!r}")
    return float(value)
