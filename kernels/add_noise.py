"""noisy = alpha * sample + sigma * noise; velocity = alpha_rate * sample + sigma_rate * noise."""

import triton
import triton.language as tl
from torch import Tensor

from .optional import contiguous
from .per_sample import BLOCK, Rows, locate, store
from .rows import load

#: registers a thread and bytes of shared memory that a kernel may take; spills are never allowed
BUDGET = {"_add_noise": (64, 0)}


@triton.jit
def _add_noise(
    sample_ptr, noise_ptr, alpha_ptr, sigma_ptr, alpha_rate_ptr, sigma_rate_ptr, noisy_ptr,
    velocity_ptr, inner, sample_stride, noise_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    row, at, mask = locate(inner, BLOCK)
    alpha = tl.load(alpha_ptr + row).to(tl.float32)
    sigma = tl.load(sigma_ptr + row).to(tl.float32)
    alpha_rate, sigma_rate = -sigma, alpha
    if alpha_rate_ptr is not None:
        alpha_rate = tl.load(alpha_rate_ptr + row).to(tl.float32)
        sigma_rate = tl.load(sigma_rate_ptr + row).to(tl.float32)
    x = load(sample_ptr, row, sample_stride, at, mask)
    noisy = alpha * x
    velocity = alpha_rate * x
    if noise_ptr is not None:
        z = load(noise_ptr, row, noise_stride, at, mask)
        noisy += sigma * z
        velocity += sigma_rate * z
    store(noisy_ptr, row, inner, at, mask, noisy)
    if velocity_ptr is not None:
        store(velocity_ptr, row, inner, at, mask, velocity)


def _mix(
    sample: Tensor, noise: Tensor | None, *scales: Tensor | None, has_velocity: bool
) -> list[Tensor]:
    rows = Rows(sample)
    sample, noise = rows.arrange(sample), rows.arrange(noise)
    results = [rows.result() for _ in range(1 + has_velocity)]
    strides = rows.strides(sample, noise, per_sample=True)
    if rows.size:
        _add_noise[rows.grid](
            sample, noise, *contiguous(*scales), results[0],
            results[1] if has_velocity else None, rows.inner, *strides, BLOCK=BLOCK,
        )  # fmt: skip
    return rows.finish(results)


def add_noise(sample: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return _mix(sample, noise, alpha, sigma, None, None, has_velocity=False)[0]


def add_noise_velocity(
    sample: Tensor,
    noise: Tensor | None,
    alpha: Tensor,
    sigma: Tensor,
    alpha_rate: Tensor | None = None,
    sigma_rate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return tuple(_mix(sample, noise, alpha, sigma, alpha_rate, sigma_rate, has_velocity=True))
