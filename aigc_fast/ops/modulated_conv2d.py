"""StyleGAN2's convolutions: with resampling, and with weights that a style modulates."""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

from aigc_fast.ops._activations import resolve
from aigc_fast.ops._autocast import under_autocast
from aigc_fast.ops._checks import check_tensor
from aigc_fast.ops._layout import wide
from aigc_fast.ops.conv2d import conv2d
from aigc_fast.ops.scale_bias_act import scale_bias_act
from aigc_fast.ops.upfirdn2d import upfirdn2d


def modulated_conv2d(
    x: Tensor,
    weight: Tensor,
    style: Tensor,
    noise: Tensor | None = None,
    strength: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    demodulate: bool = True,
    up: int = 1,
    down: int = 1,
    filter: Tensor | None = None,
    eps: float = 1e-8,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
) -> Tensor:
    """Convolves each sample with weight * style, and ends in noise, bias and activation.

        y = scale_bias_act(conv2d_resample(x * style, weight), demodulation, noise, ...)
        demodulation[n, o] = 1 / sqrt(sum over i, ky, kx of (weight[o, i] * style[n, i])^2 + eps)

    x:          (batch, in_channels, H, W), float64/32/16 or bfloat16, contiguous or channels_last.
    weight:     (out_channels, in_channels, kernel height, kernel width), any of these dtypes.
    style:      (batch, in_channels), any of these dtypes. A gain on all weights belongs here.
    demodulate: False leaves the factor out.
    up, down, filter: as for `conv2d_resample`.
    noise, strength, bias, act, alpha, gain, clamp: as for `scale_bias_act`.

    The weights of each sample, (batch, out, in, k, k), are never made: the style scales the
    channels that go into one convolution with the shared weight, the demodulation (a product of
    matrices (batch, in) and (in, out)) those that leave it. For float16 weight and style are first
    divided by their largest values, which demodulation makes good, lest the products overflow.
    Differentiable to any order.

    Raises TypeError or ValueError for a wrong dtype, shape, device, act, alpha or clamp.

    Source: Karras et al. 2020, arXiv:1912.04958, section 2.2.
    """
    check_tensor("x", x, ndim=4)
    check_tensor("weight", weight, ndim=4)
    check_tensor("style", style, shape=x.shape[:2])
    linear = resolve(act, alpha, clamp)[0] == 0
    style, demodulation = style.to(torch.promote_types(x.dtype, torch.float32)), None
    if demodulate:
        if x.dtype == torch.float16:
            weight = weight / (_largest(weight, (1, 2, 3)) * weight[0].numel() ** 0.5)
            style = style / _largest(style, (1,))
        with _no_autocast(x.device.type):
            energy = wide(weight).square().sum((2, 3))
            demodulation = torch.rsqrt(style.square() @ energy.t() + eps)
    y = conv2d_resample(scale_bias_act(x, style), weight.to(x.dtype), filter, up, down)
    if demodulate or not linear or any(p is not None for p in (noise, bias, gain, clamp)):
        y = scale_bias_act(y, demodulation, noise, strength, bias, act, alpha, gain, clamp)
    return y


def _no_autocast(device: str) -> contextlib.AbstractContextManager:
    if under_autocast(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def _largest(x: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Largest magnitude. A constant: what is divided by it and demodulated does not change."""
    return x.detach().abs().amax(dim, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def conv2d_resample(
    x: Tensor,
    weight: Tensor,
    filter: Tensor | None = None,
    up: int = 1,
    down: int = 1,
) -> Tensor:
    """conv2d with "same" padding, after FIR upsampling or before FIR downsampling.

    x:      (batch, in_channels, H, W), float64/32/16 or bfloat16.
    weight: (out_channels, in_channels, kernel height, kernel width) of odd sizes, dtype of x.
    filter: for upfirdn2d, without a gradient; its sum should be up^2. None where up = down = 1.
    up:     1, or the factor of a transposed convolution, whose gaps the filter then fills:
            y is (batch, out_channels, H up, W up).
    down:   1, or the stride after the filter: y is (batch, out_channels, H / down, W / down).

    Differentiable to any order.

    Raises TypeError or ValueError for a wrong dtype, shape, device, up, down or filter.

    Source: the layers of StyleGAN2 (Karras et al. 2020, arXiv:1912.04958).
    """
    check_tensor("weight", weight, like=("x", x), ndim=4)
    if weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"weight must have the channels of x ({x.shape[1]}) second, got {tuple(weight.shape)}"
        )
    kernel = weight.shape[2]
    if weight.shape[3] != kernel or kernel % 2 == 0:
        raise ValueError(
            f"weight must have a square kernel of odd size, got {tuple(weight.shape[2:])}"
        )
    if min(up, down) != 1 or max(up, down) < 1:
        raise ValueError(f"up or down must be 1, the other at least 1, got {up} and {down}")
    if up == down == 1:
        return conv2d(x, weight, padding=kernel // 2)
    if filter is None:
        raise ValueError("filter must be given where up or down is not 1, got None")
    taps = filter.shape[-1]
    if up > 1:
        y = F.conv_transpose2d(x, weight.transpose(0, 1), stride=up)
        # The whole is H up pixels wide, its centre that of the taps and of the kernel.
        rest = taps - up - kernel + 1
        pad = ((rest + 1) // 2 + up - 1, rest // 2 + 1)
        return upfirdn2d(y, filter, 1, 1, pad * 2)
    rest = taps - down + kernel - 1
    pad = ((rest + 1) // 2, rest // 2)
    if kernel == 1:  # the filter need not compute the pixels that the stride leaves out
        return F.conv2d(upfirdn2d(x, filter, 1, down, pad * 2), weight)
    return F.conv2d(upfirdn2d(x, filter, 1, 1, pad * 2), weight, stride=down)
