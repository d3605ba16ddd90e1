"""The gate of gated MLPs."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aigc_fast.ops._autograd import OpFunction
from aigc_fast.ops._checks import check_tensor
from aigc_fast.ops._registry import Op


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """y = silu(gate) * up, with silu(x) = x * sigmoid(x).

    gate: shape (..., width), float64/32/16 or bfloat16; y is contiguous.
    up:   shape and dtype of gate.

    Both may be the halves of one packed projection (`.chunk(2, -1)`): rows that lie a fixed stride
    apart are read in place, other strides copied once. Computes in fp32 (fp64 for fp64); the
    reference rounds silu(gate) to the dtype, the kernels only the result. Bytes that must move:
    forward 3, backward 5 times gate.

    Raises TypeError or ValueError for a wrong dtype, shape or device.

    Source: Shazeer 2020, arXiv:2002.05202.
    """
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _SwiGLU.call(gate, up)
    return _swiglu(gate, up)


def _reference(gate: Tensor, up: Tensor) -> Tensor:
    return (F.silu(gate) * up).contiguous()


def _reference_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(gate)
    dgate = dy * up * (s * (1 + gate * (1 - s)))
    return dgate.contiguous(), (dy * F.silu(gate)).contiguous()


def _check(gate: Tensor, up: Tensor) -> None:
    check_tensor("gate", gate)
    if gate.dim() == 0:
        raise ValueError("gate must have at least 1 dimension, got shape ()")
    check_tensor("up", up, like=("gate", gate), shape=gate.shape)


def _check_backward(dy: Tensor, gate: Tensor, up: Tensor) -> None:
    _check(gate, up)
    check_tensor("grad_output", dy, like=("gate", gate), shape=gate.shape)


_swiglu = Op("swiglu(Tensor gate, Tensor up) -> Tensor", _reference, _check, stem="gated_mlp")
_backward = Op(
    "swiglu_backward(Tensor grad_output, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    _reference_backward,
    _check_backward,
    stem="gated_mlp",
)


class _SwiGLU(OpFunction):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        # The reference is made of differentiable operations: higher derivatives are torch's own.
        run = _reference_backward if torch.is_grad_enabled() else _backward
        return run(dy, *ctx.saved_tensors)
