"""Batch, instance and pixel norm, each with its activation and a fused double backward."""

from typing import Any

import torch
from torch import Tensor

from aigc_fast.ops._activations import resolve
from aigc_fast.ops._checks import check_tensor
from aigc_fast.ops._norm_act import check_parameters, norm_act, normalize
from aigc_fast.ops._norm_reference import BATCH, GIVEN, PIXEL, SAMPLE
from aigc_fast.ops._norm_sync import joined_moments


def batch_norm_act(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str = "linear",
    alpha: float | None = None,
    gain: float = 1.0,
    process_group: Any = None,
) -> Tensor:
    """y = gain * act((x - mean) / sqrt(var + eps) * weight + bias), per channel.

    x:            shape (N, C, ...), float64/32/16 or bfloat16. Its memory order (contiguous,
                  channels_last, any permutation) is that of y; a tensor with gaps is copied once.
    running_mean, running_var: shape (C,) or None. In evaluation they are mean and var; in training
                  they are moved by `momentum` towards the batch's mean and unbiased variance.
    weight, bias: shape (C,) or None, of x's dtype or any other floating one (float32 parameters
                  with a bfloat16 x).
    training:     take mean and (biased) variance from x, over all dimensions but 1.
    eps:          added to the variance, any size.
    act, alpha:   as in `bias_act`: linear, relu, lrelu, tanh, sigmoid, elu, selu, softplus, swish,
                  or their other names.
    gain:         factor on the activation; 1 by default, so that the call stands for
                  torch.nn.functional.batch_norm and the activation of torch.
    process_group: in training, of the processes whose x are one batch, which need not have the same
                  size and may be empty: all of them call at once, forward and backward. None for
                  this process alone.

    Computes in fp32 (fp64 for fp64) and rounds once; sums over a channel are joined in fp64, and a
    large mean costs no digits. Saves x and the statistics for backward. Any order of derivative;
    forward, backward and double backward are kernels. Bytes that must move, times x: forward 3
    (2 in evaluation), backward 5, double backward 8; on the CPU 2, 3 and 5 where a channel of a
    contiguous x fits the L2 cache. In a process group forward 3, backward 8, and one exchange of
    2 C + 1 numbers in each; gradients, of any order, are those of the sum of all processes' losses,
    a parameter's being the part of its own process, as torch.nn.SyncBatchNorm has it.

    Raises TypeError or ValueError for a wrong dtype, shape, device, act or alpha, for fewer than
    two values a channel in training (of one process), and for missing statistics in evaluation.

    Source: Ioffe and Szegedy 2015, arXiv:1502.03167.
    """
    number, alpha, *_ = resolve(act, alpha)
    if training and process_group is not None:
        running = {"running_mean": running_mean, "running_var": running_var}
        check_parameters(x, x.shape[1] if x.dim() > 1 else 0, **running, weight=weight, bias=bias)
        mean, var, unbiased = joined_moments(x, process_group)
        y = normalize(x, mean, var, weight, bias, eps, number, gain, alpha)
    else:
        options = (BATCH if training else GIVEN, eps, number, gain, alpha)
        y, mean, var = norm_act(x, running_mean, running_var, weight, bias, options)
        if training and running_var is not None:
            count = x.numel() // max(x.shape[1], 1)
            unbiased = var * (count / max(count - 1, 1))
    if training and x.shape[1]:
        with torch.no_grad():
            if running_mean is not None:
                running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            if running_var is not None:
                running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    return y


def instance_norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    act: str = "linear",
    alpha: float | None = None,
    gain: float = 1.0,
) -> Tensor:
    """y = gain * act((x - mean) / sqrt(var + eps) * weight + bias), per channel of each sample.

    x:            shape (N, C, ...) with at least one dimension more. A contiguous x gives a
                  contiguous y, channels_last (or channels_last_3d) a y in that memory order; other
                  strides are copied once to contiguous.
    weight, bias: shape (C,), or (N, C) for those of each sample; or None.

    The other arguments, the arithmetic, derivatives, bytes and errors are those of `batch_norm_act`
    in training.

    Source: Ulyanov et al. 2016, arXiv:1607.08022.
    """
    number, alpha, *_ = resolve(act, alpha)
    weight, bias = _of_samples("weight", weight, x), _of_samples("bias", bias, x)
    options = (SAMPLE, eps, number, gain, alpha)
    return norm_act(x, None, None, weight, bias, options)[0]


def adaptive_instance_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float = 1e-5,
    act: str = "linear",
    alpha: float | None = None,
    gain: float = 1.0,
) -> Tensor:
    """y = gain * act(instance_norm(x) * (1 + scale) + shift): the norm that a style modulates.

    scale, shift: shape (N, C), any floating dtype; they may be halves of one packed projection.

    The other arguments and everything else are those of `instance_norm_act`.

    Source: Huang and Belongie 2017, arXiv:1703.06868; Karras et al. 2019, arXiv:1812.04948.
    """
    for name, p in (("scale", scale), ("shift", shift)):
        check_tensor(name, p, shape=x.shape[:2])
    return instance_norm_act(x, 1 + scale, shift, eps, act, alpha, gain)


def pixel_norm_act(
    x: Tensor,
    eps: float = 1e-8,
    act: str = "linear",
    alpha: float | None = None,
    gain: float = 1.0,
) -> Tensor:
    """y = gain * act(x / sqrt(mean(x^2) + eps)), the mean over the channels (dimension 1).

    x: shape (N, C, ...), C > 0; memory orders as for `instance_norm_act`.

    The other arguments, the arithmetic, derivatives, bytes and errors are those of `batch_norm_act`
    in training.

    Source: Karras et al. 2018, arXiv:1710.10196.
    """
    number, alpha, *_ = resolve(act, alpha)
    return norm_act(x, None, None, None, None, (PIXEL, eps, number, gain, alpha))[0]


def _of_samples(name: str, parameter: Tensor | None, x: Tensor) -> Tensor | None:
    """A parameter of shape (C,) or (N, C) with a value for each norm."""
    if parameter is None:
        return None
    if x.dim() < 2 or tuple(parameter.shape) not in (x.shape[1:2], x.shape[:2]):
        raise ValueError(
            f"{name} must have shape (C,) or (N, C) for x of shape {tuple(x.shape)}, "
            f"got {tuple(parameter.shape)}"
        )
    return parameter.expand(x.shape[:2]).reshape(-1)
