"""Sines and cosines of timesteps at dim / 2 frequencies, and the gradient of the timesteps.

In fp64, with a range reduction of our own: the library's takes local memory for large angles, and
a batch has a few thousand elements at most.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

#: registers a thread and bytes of shared memory that a kernel may take; spills are never allowed
BUDGET = {"_embed": (40, 0), "_embed_backward": (48, 64)}
BLOCK = 128


@triton.jit
def _sin_cos(angle):
    """Good to 1e-11 for angles up to 1e8: the quadrant, then the Taylor series of the rest."""
    quadrant = tl.floor(angle * 0.6366197723675814 + 0.5)
    # pi / 2 in two parts; the product with the first, of 33 bits, is exact
    r = angle - quadrant * 1.5707963267341256
    r = r - quadrant * 6.077100506506192e-11
    z = r * r
    s = -7.6471637318198164759e-13 * z + 1.6059043836821614599e-10
    s = s * z - 2.5052108385441718775e-08
    s = s * z + 2.7557319223985890653e-06
    s = s * z - 1.9841269841269841270e-04
    s = s * z + 8.3333333333333333333e-03
    s = s * z - 1.6666666666666666667e-01
    s = s * z * r + r
    c = 4.7794773323873852974e-14 * z - 1.1470745597729724714e-11
    c = c * z + 2.0876756987868098979e-09
    c = c * z - 2.7557319223985890653e-07
    c = c * z + 2.4801587301587301587e-05
    c = c * z - 1.3888888888888888889e-03
    c = c * z + 4.1666666666666666667e-02
    c = c * z - 0.5
    c = c * z + 1.0
    turn = quadrant.to(tl.int64) & 3
    odd = (turn & 1) == 1
    sine, cosine = tl.where(odd, c, s), tl.where(odd, s, c)
    sine = tl.where(turn >= 2, -sine, sine)
    cosine = tl.where((turn == 1) | (turn == 2), -cosine, cosine)
    return sine, cosine


@triton.jit
def _frequency(i, LOG_STEP: tl.constexpr, SCALE: tl.constexpr):
    # Constants of the model, and of its kernel: as arguments Triton would round them to fp32.
    return tl.exp(i.to(tl.float64) * LOG_STEP) * SCALE


@triton.jit
def _embed(
    t_ptr, t_stride, y_ptr, dim, LOG_STEP: tl.constexpr, SCALE: tl.constexpr, FLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    half = dim // 2
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    t = tl.load(t_ptr + row * t_stride).to(tl.float64)
    sine, cosine = _sin_cos(t * _frequency(i, LOG_STEP, SCALE))
    y = y_ptr + row * dim + i
    sines, cosines = (half, 0) if FLIP else (0, half)
    tl.store(y + sines, sine.to(tl.float32), i < half)
    tl.store(y + cosines, cosine.to(tl.float32), i < half)
    # Where dim is odd the column after both is 0.
    tl.store(y + half, tl.zeros([BLOCK], tl.float32), (i == half) & (2 * i < dim))


@triton.jit
def _embed_backward(
    dy_ptr, t_ptr, t_stride, dt_ptr, dim, LOG_STEP: tl.constexpr, SCALE: tl.constexpr,
    FLIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    half = dim // 2
    t = tl.load(t_ptr + row * t_stride).to(tl.float64)
    total = tl.zeros([BLOCK], tl.float64)
    sines, cosines = (half, 0) if FLIP else (0, half)
    for start in range(0, half, BLOCK):
        i = start + tl.arange(0, BLOCK)
        dy = dy_ptr + row * dim + i
        of_sine = tl.load(dy + sines, i < half, 0.0).to(tl.float64)
        of_cosine = tl.load(dy + cosines, i < half, 0.0).to(tl.float64)
        frequency = _frequency(i, LOG_STEP, SCALE)
        sine, cosine = _sin_cos(t * frequency)
        total += frequency * (of_sine * cosine - of_cosine * sine)
    tl.store(dt_ptr + row, tl.sum(total, 0).to(tl.float32).to(dt_ptr.dtype.element_ty))


def _log_step(dim: int, shift: float, period: float) -> float:
    return -math.log(period) / (dim // 2 - shift) if dim > 1 else 0.0


def timestep_embedding(
    timesteps: Tensor, dim: int, flip: bool, shift: float, scale: float, period: float
) -> Tensor:
    y = torch.empty(len(timesteps), dim, dtype=torch.float32, device=timesteps.device)
    grid = (len(timesteps), triton.cdiv(dim // 2 + 1, BLOCK))
    if len(timesteps):
        _embed[grid](
            timesteps, timesteps.stride(0), y, dim, LOG_STEP=_log_step(dim, shift, period),
            SCALE=float(scale), FLIP=flip, BLOCK=BLOCK,
        )  # fmt: skip
    return y


def timestep_embedding_backward(
    dy: Tensor, timesteps: Tensor, flip: bool, shift: float, scale: float, period: float
) -> Tensor:
    dt, dim = torch.empty(timesteps.shape, dtype=timesteps.dtype, device=dy.device), dy.shape[1]
    if len(timesteps):
        _embed_backward[(len(timesteps),)](
            dy.contiguous(), timesteps, timesteps.stride(0), dt, dim,
            LOG_STEP=_log_step(dim, shift, period), SCALE=float(scale), FLIP=flip, BLOCK=BLOCK,
        )  # fmt: skip
    return dt
