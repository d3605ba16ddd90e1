"""noisy = alpha * sample + sigma * noise; velocity = alpha * noise - sigma * sample."""

import triton
import triton.language as tl
from torch import Tensor

from .per_sample import BLOCK, Rows, load, locate, store

#: registers a thread and bytes of shared memory that a kernel may take; spills are never allowed
BUDGET = {"_add_noise": (64, 0)}


@triton.jit
def _add_noise(
    sample_ptr, noise_ptr, alpha_ptr, sigma_ptr, noisy_ptr, velocity_ptr, inner, sample_stride,
    noise_stride, HAS_NOISE: tl.constexpr, HAS_VELOCITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, at, mask = locate(inner, BLOCK)
    alpha = tl.load(alpha_ptr + row).to(tl.float32)
    sigma = tl.load(sigma_ptr + row).to(tl.float32)
    x = load(sample_ptr, row, sample_stride, at, mask)
    noisy = alpha * x
    velocity = -sigma * x
    if HAS_NOISE:
        z = load(noise_ptr, row, noise_stride, at, mask)
        noisy += sigma * z
        velocity += alpha * z
    store(noisy_ptr, row, inner, at, mask, noisy)
    if HAS_VELOCITY:
        store(velocity_ptr, row, inner, at, mask, velocity)


def add_noise(
    sample: Tensor,
    noise: Tensor | None,
    alpha: Tensor,
    sigma: Tensor,
    return_velocity: bool = False,
) -> list[Tensor]:
    rows = Rows(sample)
    sample, noise = rows.arrange(sample), rows.arrange(noise)
    noisy = rows.result()
    velocity = rows.result() if return_velocity else None
    strides = rows.strides(sample, noise, per_sample=True)
    if rows.size:
        _add_noise[rows.grid](
            sample, noise, alpha.contiguous(), sigma.contiguous(), noisy, velocity, rows.inner,
            *strides, HAS_NOISE=noise is not None, HAS_VELOCITY=return_velocity, BLOCK=BLOCK,
        )  # fmt: skip
    return rows.finish([noisy] if velocity is None else [noisy, velocity])
