"""Snake between an upsampling and a downsampling filter: the anti-aliased activation of BigVGAN."""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aigc_fast.ops._autograd import OpFunction
from aigc_fast.ops._checks import check_device, check_tensor
from aigc_fast.ops._layout import channels_innermost, is_channels_innermost, wide
from aigc_fast.ops._registry import FLOATS, define
from aigc_fast.ops.snake import _check as check_snake
from aigc_fast.ops.snake import _reference as reference_snake
from aigc_fast.ops.snake import reference_backward as reference_snake_backward
from aigc_fast.ops.snake import scales

TAPS = 12
#: samples of x on either side that a sample of y depends on, through both filters
REACH = 5


def alias_free_snake(
    x: Tensor,
    alpha: Tensor,
    beta: Tensor | None = None,
    up_filter: Tensor | None = None,
    down_filter: Tensor | None = None,
    *,
    log_scale: bool = False,
) -> Tensor:
    """Up by 2, snake, down by 2, in one pass: snake without the frequencies that it would fold.

    1. x is continued beyond its ends by its first and last sample;
    2. a zero after every sample, then the convolution with `up_filter`, times 2;
    3. `snake` with alpha, beta and log_scale;
    4. the result, continued in the same way, is correlated with `down_filter`; every second sample
       is kept, so that y has the length of x.

    x:           (batch, channels, time), time > 0, float64/32/16 or bfloat16. Where its channels
                 are innermost in memory, as conv1d leaves them, so are those of y; else y is
                 contiguous.
    alpha, beta: shape (channels,), dtype of x; None: beta is alpha.
    up_filter, down_filter: shape (12,), any floating dtype, used in fp32 (fp64 for fp64); they have
                 no gradient. None: BigVGAN's low-pass filter, a sinc of cutoff 1/4 in a Kaiser
                 window.

    Exact at the ends too. Computes in fp32 and rounds once: what lies between x and y never leaves
    the cache. The gradients of alpha and beta are summed in the pass of backward, in fp64 on a
    CPU. Saves x. Bytes that must move: forward 2, backward 3 times x. Higher derivatives are
    torch's own.

    Raises TypeError or ValueError for a wrong dtype, shape or device, and for a filter that
    requires a gradient.

    Source: Lee et al. 2023, arXiv:2206.04658; the filters of Karras et al. 2021, arXiv:2106.12423.
    """
    alpha, beta = scales(alpha, beta, log_scale)
    up, down = default_filters(x.device)
    up, down = up if up_filter is None else up_filter, down if down_filter is None else down_filter
    for name, taps in (("up_filter", up), ("down_filter", down)):
        if taps.requires_grad:
            raise ValueError(f"{name} must not require a gradient: it has none")
    if torch.is_grad_enabled() and (x.requires_grad or alpha.requires_grad or beta.requires_grad):
        return _AliasFreeSnake.call(x, alpha, beta, up, down)
    return _alias_free_snake(x, alpha, beta, up, down)


def _kaiser_sinc() -> Tensor:
    """A low-pass filter that halves the band, its transition 0.6 of it wide; the sum is 1."""
    half = TAPS // 2
    attenuation = 2.285 * (half - 1) * math.pi * 4 * 0.3 + 7.95
    on_cpu: Any = dict(dtype=torch.float64, device="cpu")
    window = torch.kaiser_window(TAPS, periodic=False, beta=0.1102 * (attenuation - 8.7), **on_cpu)
    time = torch.arange(-half, half, **on_cpu) + 0.5
    taps = window * torch.sinc(time / 2)
    return taps / taps.sum()


# Two tensors: torch.compile refuses a Function that gets one twice.
_FILTERS = _kaiser_sinc(), _kaiser_sinc()


def default_filters(device: torch.device) -> tuple[Tensor, Tensor]:
    """BigVGAN's filter for either use, float64; one copy for each device, made on first use."""
    if device.type == "cpu" or torch.compiler.is_compiling():
        return _FILTERS[0].to(device), _FILTERS[1].to(device)
    return _copies_on(device)


@functools.cache
def _copies_on(device: torch.device) -> tuple[Tensor, Tensor]:
    return _FILTERS[0].to(device), _FILTERS[1].to(device)


def _up(x: Tensor, taps: Tensor) -> Tensor:
    """(rows, 1, time) to (rows, 1, 2 time)."""
    x = F.pad(x, (5, 5), mode="replicate")
    return F.conv_transpose1d(x, 2 * taps, stride=2)[..., 15:-15]


def _down(x: Tensor, taps: Tensor) -> Tensor:
    """(rows, 1, 2 time) to (rows, 1, time)."""
    return F.conv1d(F.pad(x, (5, 6), mode="replicate"), taps, stride=2)


def _up_adjoint(dx: Tensor, taps: Tensor) -> Tensor:
    return _pad_adjoint(F.conv1d(F.pad(dx, (15, 15)), 2 * taps, stride=2), 5, 5)


def _down_adjoint(dx: Tensor, taps: Tensor) -> Tensor:
    return _pad_adjoint(F.conv_transpose1d(dx, taps, stride=2, output_padding=1), 5, 6)


def _pad_adjoint(dx: Tensor, left: int, right: int) -> Tensor:
    """What lies beyond an end is added to the sample there."""
    inner = dx.shape[-1] - left - right
    first = dx[..., :left].sum(-1, keepdim=True)
    last = dx[..., left + inner :].sum(-1, keepdim=True)
    return dx[..., left : left + inner] + F.pad(first, (0, inner - 1)) + F.pad(last, (inner - 1, 0))


def _parts(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x upsampled, (batch, channels, 2 time), and the filters as torch's convolutions take them."""
    at = wide(x)
    up, down = up.to(at.dtype).view(1, 1, -1), down.to(at.dtype).view(1, 1, -1)
    return _up(at.reshape(-1, 1, x.shape[2]), up).reshape(*x.shape[:2], -1), up, down


def _reference(x: Tensor, alpha: Tensor, beta: Tensor, up: Tensor, down: Tensor) -> Tensor:
    if not x.numel():
        return x.clone(memory_format=torch.contiguous_format)
    z, up, down = _parts(x, up, down)
    z = reference_snake(z, alpha, beta)
    y = _down(z.reshape(-1, 1, z.shape[2]), down).reshape(x.shape).to(x.dtype)
    return channels_innermost(y) if is_channels_innermost(x) else y


def _reference_backward(
    dy: Tensor, x: Tensor, alpha: Tensor, beta: Tensor, up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if not x.numel():
        dx = x.clone(memory_format=torch.contiguous_format)
        return dx, torch.zeros_like(alpha), torch.zeros_like(beta)
    z, up, down = _parts(x, up, down)
    dz = _down_adjoint(wide(dy).reshape(-1, 1, x.shape[2]), down).reshape(z.shape)
    dz, dalpha, dbeta = reference_snake_backward(dz, z, alpha, beta)
    dx = _up_adjoint(dz.reshape(-1, 1, z.shape[2]), up).reshape(x.shape)
    return dx.to(x.dtype), dalpha, dbeta


def _check(x: Tensor, alpha: Tensor, beta: Tensor, up: Tensor, down: Tensor) -> None:
    check_tensor("x", x, ndim=3)
    check_snake(x, alpha, beta)
    if x.shape[2] == 0:
        raise ValueError(f"x must have at least one sample, got shape {tuple(x.shape)}")
    for name, taps in (("up_filter", up), ("down_filter", down)):
        check_tensor(name, taps, dtypes=FLOATS, shape=(TAPS,))
        check_device(name, taps, ("x", x))


def _check_backward(dy: Tensor, x: Tensor, *parameters: Tensor) -> None:
    _check(x, *parameters)
    check_tensor("grad_output", dy, like=("x", x), shape=x.shape)


_alias_free_snake = define(
    "alias_free_snake(Tensor x, Tensor alpha, Tensor beta, Tensor up_filter, Tensor down_filter)"
    " -> Tensor",
    _reference,
    _check,
    stem="alias_free_snake",
)
_backward = define(
    "alias_free_snake_backward(Tensor grad_output, Tensor x, Tensor alpha, Tensor beta,"
    " Tensor up_filter, Tensor down_filter) -> (Tensor, Tensor, Tensor)",
    _reference_backward,
    _check_backward,
    stem="alias_free_snake",
)


class _AliasFreeSnake(OpFunction):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, alpha: Tensor, beta: Tensor, up: Tensor, down: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, alpha, beta, up, down)
        return _alias_free_snake(x, alpha, beta, up, down)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        # The reference is made of differentiable operations: higher derivatives are torch's own.
        run: Any = _reference_backward if torch.is_grad_enabled() else _backward
        return *run(dy, *ctx.saved_tensors), None, None
