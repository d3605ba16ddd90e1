"""LayerNorm and RMSNorm with the scale and shift of a condition after them (AdaLN)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aigc_fast.ops._autograd import OpFunction
from aigc_fast.ops._checks import check_device, check_tensor
from aigc_fast.ops._layout import wide
from aigc_fast.ops._registry import define


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """y = (x - mean) / sqrt(var + eps) * weight + bias over the last dimension.

    x:            (..., width), float64/32/16 or bfloat16; y is contiguous. Rows that lie a fixed
                  stride apart are read in place, other strides copied once.
    weight, bias: shape (width,), dtype of x, or None for ones and zeros.
    eps:          added to the variance.

    Arithmetic, derivatives, bytes and errors are those of `modulated_layer_norm`.
    """
    return _call(x, None, None, weight, bias, eps, False)


def modulated_layer_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """y = layer_norm(x) * (1 + scale) + shift, over the last dimension.

    x:     (batch, ..., width), float64/32/16 or bfloat16; y is contiguous. Rows that lie a fixed
           stride apart are read in place, other strides copied once.
    scale, shift: one row of width for each sample (batch, width), each token (batch, tokens,
           width) or each frame (batch, frames, width), the tokens of a sample falling into `frames`
           equal runs; both of one shape and dtype, that of x or float32. Slices of a packed
           projection are read in place.
    weight, bias: shape (width,), dtype of x, or None: the norm's own, before the modulation.
    eps:   added to the variance.

    Computes in fp32 (fp64 for fp64) and rounds once; the variance is a second pass over the row.
    The gradients of scale, shift, weight and bias are summed over tokens in fp32, in an order that
    the shape alone decides. Saves x for backward. Bytes that must move: forward 2, backward 3
    times x, and the modulation.

    Raises TypeError or ValueError for a wrong dtype, shape or device.

    Source: Peebles and Xie 2022, arXiv:2212.09748 (adaLN).
    """
    _check_given(scale, shift)
    return _call(x, scale, shift, weight, bias, eps, False)


def modulated_rms_norm(
    x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight * (1 + scale) + shift, over the last dimension.

    Arguments, arithmetic and errors are those of `modulated_layer_norm`.
    """
    _check_given(scale, shift)
    return _call(x, scale, shift, weight, None, eps, True)


def _check_given(scale: Tensor, shift: Tensor) -> None:
    if scale is None or shift is None:  # for the operator there may be none
        raise TypeError("scale and shift must be tensors, got None")


def _call(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, eps: float, rms: bool,
) -> Tensor:  # fmt: skip
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (scale is not None and scale.requires_grad)
        or (shift is not None and shift.requires_grad)
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    ):
        return _ModulatedNorm.call(x, scale, shift, weight, bias, eps, rms)
    return _modulated_norm(x, scale, shift, weight, bias, eps, rms)


def by_modulation(x: Tensor, modulation: Tensor | None) -> Tensor:
    """x as (rows of the modulation, rows of x for each, width)."""
    width = x.shape[-1]
    rows = x.shape[:-1].numel()
    count = 1 if modulation is None else modulation.shape[:-1].numel()
    return x.reshape(count, rows // max(count, 1), width)


def _statistics(x: Tensor, eps: float, rms: bool) -> tuple[Tensor, Tensor]:
    """(normed, 1 / deviation) of rows in fp32 or fp64."""
    centred = x if rms else x - x.mean(-1, keepdim=True)
    factor = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return centred * factor, factor


def _reference(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, eps: float, rms: bool,
) -> Tensor:  # fmt: skip
    dtype = x.dtype if scale is None else scale.dtype
    rows = by_modulation(x, scale).to(dtype)
    weight, bias = (None if p is None else p.to(dtype) for p in (weight, bias))
    if rms:
        y = _statistics(wide(rows), eps, True)[0].to(dtype)
        y = y if weight is None else y * weight
    else:
        y = F.layer_norm(rows, x.shape[-1:], weight, bias, eps)
    if scale is not None and shift is not None:
        y = y * (1 + by_modulation(scale, scale)) + by_modulation(shift, shift)
    return y.to(x.dtype).reshape(x.shape).contiguous()


def reference_backward(
    dy: Tensor, dsum: Tensor | None, x: Tensor, branch: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    modulation = scale if gate is None else gate
    normed, factor = _statistics(wide(by_modulation(x, modulation)), eps, rms)
    grad = wide(by_modulation(dy, modulation))
    by_scale = grad if scale is None else grad * (1 + wide(by_modulation(scale, scale)))
    g = by_scale if weight is None else by_scale * wide(weight)
    inner = normed * (g * normed).mean(-1, keepdim=True)
    dx = (g - (inner if rms else inner + g.mean(-1, keepdim=True))) * factor
    if dsum is not None:
        dx = dx + wide(by_modulation(dsum, modulation))

    def like(value: Tensor, p: Tensor | None) -> Tensor:
        if p is None:
            return x.new_empty(0)
        return value.to(p.dtype).reshape(p.shape).contiguous()

    dbranch, dgate = x.new_empty(0), x.new_empty(0)
    if branch is not None and gate is not None:
        dbranch = like(dx * wide(by_modulation(gate, gate)), branch)
        dgate = like((dx * wide(by_modulation(branch, gate))).sum(1), gate)
    affine = normed if weight is None else normed * wide(weight)
    affine = affine if bias is None else affine + wide(bias)
    return (
        like(dx, x), dbranch, dgate, like((grad * affine).sum(1), scale), like(grad.sum(1), scale),
        like((by_scale * normed).sum((0, 1)), weight), like(by_scale.sum((0, 1)), bias),
    )  # fmt: skip


def check_modulation(x: Tensor, **modulation: Tensor | None) -> None:
    check_tensor("x", x)
    if x.dim() < 1 or (x.dim() < 2 and any(p is not None for p in modulation.values())):
        raise ValueError(f"x must have at least 2 dimensions, got shape {tuple(x.shape)}")
    first: tuple[str, Tensor] | None = None
    for name, p in modulation.items():
        if p is None:
            continue
        if first is not None:
            check_tensor(name, p, like=first, shape=first[1].shape)
            continue
        first = name, p
        if x.dtype in (torch.float16, torch.bfloat16):
            check_tensor(name, p, dtypes=(x.dtype, torch.float32))
            check_device(name, p, ("x", x))
        else:
            check_tensor(name, p, like=("x", x))
        tokens = x.shape[1:-1].numel()
        runs = 1 if p.dim() == 2 else p.shape[1] if p.dim() == 3 else -1
        divides = runs == tokens or (runs > 0 and tokens % runs == 0)
        if runs < 0 or p.shape[0] != x.shape[0] or p.shape[-1] != x.shape[-1] or not divides:
            raise ValueError(
                f"{name} must have shape (batch, width) or (batch, frames, width) for x of shape "
                f"{tuple(x.shape)}, frames dividing its {tokens} tokens; got {tuple(p.shape)}"
            )


def check_affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None:
            check_tensor(name, p, like=("x", x), shape=x.shape[-1:])


def _check(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, *_: Any,
) -> None:  # fmt: skip
    check_modulation(x, scale=scale, shift=shift)
    if (scale is None) != (shift is None):
        raise TypeError("scale and shift must both be tensors, or both be None")
    check_affine(x, weight, bias)


def _check_backward(
    dy: Tensor, dsum: Tensor | None, x: Tensor, branch: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, weight: Tensor | None, bias: Tensor | None, *_: Any,
) -> None:  # fmt: skip
    check_modulation(x, scale=scale, gate=gate)
    check_affine(x, weight, bias)
    for name, p in (("grad_output", dy), ("grad_residual", dsum), ("branch", branch)):
        if p is not None:
            check_tensor(name, p, like=("x", x), shape=x.shape)


_modulated_norm = define(
    "modulated_norm(Tensor x, Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias,"
    " float eps, bool rms) -> Tensor",
    _reference,
    _check,
    stem="layer_norm",
)
#: Gradients of x (the norm's input), the branch that gate scaled, gate, scale, shift, weight, bias;
#: empty where there is none. grad_residual is what arrives for x beside the norm.
norm_backward = define(
    "modulated_norm_backward(Tensor grad_output, Tensor? grad_residual, Tensor x, Tensor? branch,"
    " Tensor? gate, Tensor? scale, Tensor? weight, Tensor? bias, float eps, bool rms)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference_backward,
    _check_backward,
    stem="layer_norm",
)


class _ModulatedNorm(OpFunction):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor | None,
        bias: Tensor | None, eps: float, rms: bool,
    ) -> Tensor:  # fmt: skip
        ctx.options = eps, rms
        ctx.save_for_backward(x, scale, weight, bias)
        return _modulated_norm(x, scale, shift, weight, bias, eps, rms)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        x, scale, weight, bias = ctx.saved_tensors
        # The reference is made of differentiable operations: higher derivatives are torch's own.
        run: Any = reference_backward if torch.is_grad_enabled() else norm_backward
        dx, _, _, *rest = run(dy, None, x, None, None, scale, weight, bias, *ctx.options)
        inputs = (scale, scale, weight, bias)
        grads = [None if p is None else g for p, g in zip(inputs, rest, strict=True)]
        return dx, *grads, None, None
