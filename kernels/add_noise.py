"""noisy = alpha * sample + sigma * noise; velocity = alpha_rate * sample + sigma_rate * noise."""

import triton
import triton.language as tl
from torch import Tensor

from .per_sample import BLOCK, Rows, load, locate, store

#: registers a thread and bytes of shared memory that a kernel may take; spills are never allowed
BUDGET = {"_add_noise": (64, 0)}


@triton.jit
def _add_noise(
    sample_ptr, noise_ptr, alpha_ptr, sigma_ptr, alpha_rate_ptr, sigma_rate_ptr, noisy_ptr,
    velocity_ptr, inner, sample_stride, noise_stride, HAS_NOISE: tl.constexpr,
    HAS_VELOCITY: tl.constexpr, HAS_RATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, at, mask = locate(inner, BLOCK)
    alpha = tl.load(alpha_ptr + row).to(tl.float32)
    sigma = tl.load(sigma_ptr + row).to(tl.float32)
    alpha_rate, sigma_rate = -sigma, alpha
    if HAS_RATES:
        alpha_rate = tl.load(alpha_rate_ptr + row).to(tl.float32)
        sigma_rate = tl.load(sigma_rate_ptr + row).to(tl.float32)
    x = load(sample_ptr, row, sample_stride, at, mask)
    noisy = alpha * x
    velocity = alpha_rate * x
    if HAS_NOISE:
        z = load(noise_ptr, row, noise_stride, at, mask)
        noisy += sigma * z
        velocity += sigma_rate * z
    store(noisy_ptr, row, inner, at, mask, noisy)
    if HAS_VELOCITY:
        store(velocity_ptr, row, inner, at, mask, velocity)


def add_noise(
    sample: Tensor,
    noise: Tensor | None,
    alpha: Tensor,
    sigma: Tensor,
    return_velocity: bool = False,
    alpha_rate: Tensor | None = None,
    sigma_rate: Tensor | None = None,
) -> list[Tensor]:
    rows = Rows(sample)
    sample, noise = rows.arrange(sample), rows.arrange(noise)
    noisy = rows.result()
    velocity = rows.result() if return_velocity else None
    strides = rows.strides(sample, noise, per_sample=True)
    if rows.size:
        scales = (alpha, sigma, alpha_rate, sigma_rate)
        _add_noise[rows.grid](
            sample, noise, *(s if s is None else s.contiguous() for s in scales), noisy, velocity,
            rows.inner, *strides, HAS_NOISE=noise is not None, HAS_VELOCITY=return_velocity,
            HAS_RATES=alpha_rate is not None, BLOCK=BLOCK,
        )  # fmt: skip
    return rows.finish([noisy] if velocity is None else [noisy, velocity])
