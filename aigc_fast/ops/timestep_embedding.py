"""Sinusoidal embedding of timesteps."""

import math
from typing import Any

import torch
from torch import Tensor

from aigc_fast.ops._autograd import OpFunction
from aigc_fast.ops._checks import check_tensor
from aigc_fast.ops._layout import wide_dtype
from aigc_fast.ops._registry import define


def timestep_embedding(
    timesteps: Tensor,
    dim: int,
    *,
    flip_sin_to_cos: bool = False,
    downscale_freq_shift: float = 1.0,
    scale: float = 1.0,
    max_period: float = 10000.0,
) -> Tensor:
    """Sines, then cosines, of each timestep at dim // 2 frequencies:

        angle[b, i] = scale * timesteps[b] * max_period ** (-i / (dim // 2 - downscale_freq_shift))

    timesteps: (batch,), whole or fractional numbers of any integer or floating dtype.
    dim:       width of the result; the last column is 0 where it is odd.
    flip_sin_to_cos: the cosines come first.
    downscale_freq_shift: 1 spreads the frequencies from 1 to 1 / max_period, 0 stops one short of
               it. Less than dim // 2.

    Returns float32 (batch, dim), float64 for float64 timesteps, as diffusers does whatever the
    dtype of the model. Angles are computed in float64 everywhere: in float32 those of timesteps in
    the thousands are off in the fourth digit. Differentiable to any order in timesteps.

    Raises TypeError or ValueError for a wrong dtype, shape, dim, downscale_freq_shift or
    max_period.

    Source: Vaswani et al. 2017, arXiv:1706.03762; Ho et al. 2020, arXiv:2006.11239.
    """
    if not max_period > 0:
        raise ValueError(f"max_period must be positive, got {max_period}")
    if not (timesteps.is_floating_point() or timesteps.is_complex()):
        timesteps = timesteps.float()
    args = timesteps, dim, flip_sin_to_cos, downscale_freq_shift, scale, max_period
    if torch.is_grad_enabled() and timesteps.requires_grad:
        return _TimestepEmbedding.call(*args)
    return _timestep_embedding(*args)


def _frequencies(timesteps: Tensor, dim: int, shift: float, scale: float, period: float) -> Tensor:
    # Not torch.exp, whose last bit a timestep of 1000 makes the last three of the angle.
    half = dim // 2
    step = -math.log(period) / (half - shift) if half else 0.0
    values = [scale * math.exp(step * i) for i in range(half)]
    return torch.tensor(values, dtype=torch.float64, device=timesteps.device)


def _reference(
    timesteps: Tensor, dim: int, flip: bool, shift: float, scale: float, period: float
) -> Tensor:
    angle = timesteps.double()[:, None] * _frequencies(timesteps, dim, shift, scale, period)
    halves = [angle.cos(), angle.sin()] if flip else [angle.sin(), angle.cos()]
    if dim % 2:
        halves.append(torch.zeros_like(timesteps, dtype=torch.float64)[:, None])
    return torch.cat(halves, 1).to(wide_dtype(timesteps.dtype))


def _reference_backward(
    dy: Tensor, timesteps: Tensor, flip: bool, shift: float, scale: float, period: float
) -> Tensor:
    dim = dy.shape[1]
    frequencies = _frequencies(timesteps, dim, shift, scale, period)
    angle = timesteps.double()[:, None] * frequencies
    first, second = dy[:, : dim // 2].double(), dy[:, dim // 2 : dim // 2 * 2].double()
    of_sin, of_cos = (second, first) if flip else (first, second)
    return ((of_sin * angle.cos() - of_cos * angle.sin()) @ frequencies).to(timesteps.dtype)


def _check(timesteps: Tensor, dim: int, flip: bool, shift: float, *_: Any) -> None:
    check_tensor("timesteps", timesteps, ndim=1)
    if dim < 1:
        raise ValueError(f"dim must be positive, got {dim}")
    if dim > 1 and not shift < dim // 2:
        raise ValueError(
            f"downscale_freq_shift must be less than dim // 2 = {dim // 2}, got {shift}"
        )


def _check_backward(dy: Tensor, timesteps: Tensor, *options: Any) -> None:
    check_tensor("timesteps", timesteps, ndim=1)
    check_tensor("grad_output", dy, dtypes=(wide_dtype(timesteps.dtype),), ndim=2)
    _check(timesteps, dy.shape[1], *options)
    if dy.shape[0] != timesteps.shape[0]:
        raise ValueError(
            f"grad_output must have {timesteps.shape[0]} rows, got shape {tuple(dy.shape)}"
        )


_timestep_embedding = define(
    "timestep_embedding(Tensor timesteps, int dim, bool flip_sin_to_cos,"
    " float downscale_freq_shift, float scale, float max_period) -> Tensor",
    _reference,
    _check,
    stem="timestep_embedding",
)
_backward = define(
    "timestep_embedding_backward(Tensor grad_output, Tensor timesteps, bool flip_sin_to_cos,"
    " float downscale_freq_shift, float scale, float max_period) -> Tensor",
    _reference_backward,
    _check_backward,
    stem="timestep_embedding",
)


class _TimestepEmbedding(OpFunction):
    @staticmethod
    def forward(
        ctx: Any, timesteps: Tensor, dim: int, flip: bool, shift: float, scale: float, period: float
    ) -> Tensor:
        ctx.options = flip, shift, scale, period
        ctx.save_for_backward(timesteps)
        return _timestep_embedding(timesteps, dim, flip, shift, scale, period)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        # The reference is made of differentiable operations: higher derivatives are torch's own.
        run: Any = _reference_backward if torch.is_grad_enabled() else _backward
        return run(dy, *ctx.saved_tensors, *ctx.options), None, None, None, None, None
