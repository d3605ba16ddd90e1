"""The gated residual of a diffusion transformer's block, alone or with the norm after it."""

from typing import Any

import torch
from torch import Tensor

from aigc_fast.ops._autograd import OpFunction
from aigc_fast.ops._checks import check_tensor
from aigc_fast.ops._layout import wide
from aigc_fast.ops._registry import define
from aigc_fast.ops.layer_norm import (
    _reference as _reference_norm,
)
from aigc_fast.ops.layer_norm import (
    by_modulation,
    check_affine,
    check_modulation,
    norm_backward,
    reference_backward,
)


def gated_residual(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """y = residual + gate * x.

    residual, x: (batch, ..., width), float64/32/16 or bfloat16; y is contiguous. Rows that lie a
          fixed stride apart are read in place, other strides copied once.
    gate: (batch, width), (batch, tokens, width) or (batch, frames, width), dtype of x or float32,
          as scale and shift of `modulated_layer_norm`.

    Computes in fp32 (fp64 for fp64) and rounds once. The gradient of gate is summed over tokens in
    fp32. Saves x. Bytes that must move: forward 3, backward 3 times x, and the gate.

    Raises TypeError or ValueError for a wrong dtype, shape or device.

    Source: Peebles and Xie 2022, arXiv:2212.09748 (adaLN-Zero).
    """
    if torch.is_grad_enabled() and (
        residual.requires_grad or x.requires_grad or gate.requires_grad
    ):
        return _GatedResidual.call(residual, x, gate)
    return _gated_residual(residual, x, gate)


def gated_residual_norm(
    residual: Tensor,
    x: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    norm: str = "layer",
) -> tuple[Tensor, Tensor]:
    """(y, new_residual): new_residual = residual + gate * x, y = its modulated norm.

    residual, x, gate: as for `gated_residual`.
    scale, shift, weight, bias, eps: as for `modulated_layer_norm`; scale and shift of gate's shape
          and dtype.
    norm: "layer", or "rms" for `modulated_rms_norm`, which has no bias.

    The norm reads new_residual as its dtype rounds it. Backward is one pass that adds the gradients
    of both results. Saves x and new_residual. Bytes that must move: forward 4, backward 6 times x,
    and the modulation.

    Raises TypeError or ValueError for a wrong dtype, shape, device or norm.
    """
    if norm not in ("layer", "rms"):
        raise ValueError(f"norm must be 'layer' or 'rms', got {norm!r}")
    args = residual, x, gate, scale, shift, weight, bias, eps, norm == "rms"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:7]):
        return _GatedResidualNorm.call(*args)
    return _gated_residual_norm(*args)


def _reference(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    branch = by_modulation(x, gate) * by_modulation(gate, gate)
    y = by_modulation(residual, gate) + branch
    return y.to(x.dtype).reshape(x.shape).contiguous()


def _reference_both(
    residual: Tensor, x: Tensor, gate: Tensor, scale: Tensor, shift: Tensor,
    weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    new_residual = _reference(residual, x, gate)
    return _reference_norm(new_residual, scale, shift, weight, bias, eps, rms), new_residual


def _reference_backward(dy: Tensor, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    grad = wide(by_modulation(dy, gate))
    dx = (grad * wide(by_modulation(gate, gate))).to(x.dtype).reshape(x.shape).contiguous()
    dgate = (grad * wide(by_modulation(x, gate))).sum(1).to(gate.dtype).reshape(gate.shape)
    return dx, dgate.contiguous()


def _check(residual: Tensor, x: Tensor, gate: Tensor) -> None:
    check_modulation(x, gate=gate)
    check_tensor("residual", residual, like=("x", x), shape=x.shape)


def _check_both(
    residual: Tensor, x: Tensor, gate: Tensor, scale: Tensor, shift: Tensor,
    weight: Tensor | None, bias: Tensor | None, *_: Any,
) -> None:  # fmt: skip
    check_modulation(x, gate=gate, scale=scale, shift=shift)
    check_tensor("residual", residual, like=("x", x), shape=x.shape)
    check_affine(x, weight, bias)


def _check_backward(dy: Tensor, x: Tensor, gate: Tensor) -> None:
    check_modulation(x, gate=gate)
    check_tensor("grad_output", dy, like=("x", x), shape=x.shape)


_gated_residual = define(
    "gated_residual(Tensor residual, Tensor x, Tensor gate) -> Tensor",
    _reference,
    _check,
    stem="layer_norm",
)
_backward = define(
    "gated_residual_backward(Tensor grad_output, Tensor x, Tensor gate) -> (Tensor, Tensor)",
    _reference_backward,
    _check_backward,
    stem="layer_norm",
)
_gated_residual_norm = define(
    "gated_residual_norm(Tensor residual, Tensor x, Tensor gate, Tensor scale, Tensor shift,"
    " Tensor? weight, Tensor? bias, float eps, bool rms) -> (Tensor, Tensor)",
    _reference_both,
    _check_both,
    stem="layer_norm",
)


class _GatedResidual(OpFunction):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(x, gate)
        return _gated_residual(residual, x, gate)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        # The reference is made of differentiable operations: higher derivatives are torch's own.
        run: Any = _reference_backward if torch.is_grad_enabled() else _backward
        return dy, *run(dy, *ctx.saved_tensors)


class _GatedResidualNorm(OpFunction):
    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, x: Tensor, gate: Tensor, scale: Tensor, shift: Tensor,
        weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        y, total = _gated_residual_norm(residual, x, gate, scale, shift, weight, bias, eps, rms)
        ctx.options = eps, rms
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, x, gate, scale, weight, bias)
        return y, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None) -> tuple:
        total, x, gate, scale, weight, bias = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(total)
        run: Any = reference_backward if torch.is_grad_enabled() else norm_backward
        grads = run(dy, dsum, total, x, gate, scale, weight, bias, *ctx.options)
        dweight = None if weight is None else grads[5]
        return *grads[:5], dweight, None if bias is None else grads[6], None, None
