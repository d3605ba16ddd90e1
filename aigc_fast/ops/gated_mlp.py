"""The gates of gated MLPs."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aigc_fast.ops._autograd import OpFunction
from aigc_fast.ops._checks import check_tensor
from aigc_fast.ops._registry import define


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
        return _Gated.call(gate, up, None)
    return _swiglu(gate, up)


def geglu(gate: Tensor, up: Tensor, *, approximate: str = "none") -> Tensor:
    """y = gelu(gate) * up, with gelu(x) = x * Phi(x), Phi the standard normal distribution.

    gate, up:    as for `swiglu`, and so are y, the strides read in place and the bytes that move.
    approximate: "none" is gelu itself (its erf form), "tanh" the approximation
                 x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))) / 2.

    Raises TypeError or ValueError for a wrong dtype, shape, device or `approximate`.

    Source: Shazeer 2020, arXiv:2002.05202; Hendrycks and Gimpel 2016, arXiv:1606.08415.
    """
    tanh = _TANH.get(approximate)
    if tanh is None:
        raise ValueError(f"approximate must be 'none' or 'tanh', got {approximate!r}")
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _Gated.call(gate, up, tanh)
    return _geglu(gate, up, tanh)


_TANH = {"none": False, "tanh": True}


def _reference(gate: Tensor, up: Tensor, tanh: bool | None = None) -> Tensor:
    return (_activate(gate, tanh) * up).contiguous()


def _activate(x: Tensor, tanh: bool | None) -> Tensor:
    """The activation: silu for None, gelu for False, its tanh approximation for True."""
    return F.silu(x) if tanh is None else F.gelu(x, approximate="tanh" if tanh else "none")


def _slope(x: Tensor, tanh: bool | None) -> Tensor:
    if tanh is False:
        density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return 0.5 * torch.erfc(-x / math.sqrt(2)) + x * density
    # gelu's (1 + tanh(u)) / 2 is sigmoid(2 * u).
    k = math.sqrt(8 / math.pi)
    s = torch.sigmoid(k * x * (1 + 0.044715 * x * x) if tanh else x)
    du = k * (1 + 3 * 0.044715 * x * x) if tanh else 1
    return s * (1 + x * du * (1 - s))


def _reference_backward(
    dy: Tensor, gate: Tensor, up: Tensor, tanh: bool | None = None
) -> tuple[Tensor, Tensor]:
    dgate = dy * up * _slope(gate, tanh)
    return dgate.contiguous(), (dy * _activate(gate, tanh)).contiguous()


def _check(gate: Tensor, up: Tensor, tanh: bool | None = None) -> None:
    check_tensor("gate", gate)
    if gate.dim() == 0:
        raise ValueError("gate must have at least 1 dimension, got shape ()")
    check_tensor("up", up, like=("gate", gate), shape=gate.shape)


def _check_backward(dy: Tensor, gate: Tensor, up: Tensor, tanh: bool | None = None) -> None:
    _check(gate, up)
    check_tensor("grad_output", dy, like=("gate", gate), shape=gate.shape)


_swiglu = define("swiglu(Tensor gate, Tensor up) -> Tensor", _reference, _check, stem="gated_mlp")
_swiglu_backward = define(
    "swiglu_backward(Tensor grad_output, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    _reference_backward,
    _check_backward,
    stem="gated_mlp",
)
_geglu = define(
    "geglu(Tensor gate, Tensor up, bool tanh) -> Tensor", _reference, _check, stem="gated_mlp"
)
_geglu_backward = define(
    "geglu_backward(Tensor grad_output, Tensor gate, Tensor up, bool tanh) -> (Tensor, Tensor)",
    _reference_backward,
    _check_backward,
    stem="gated_mlp",
)


class _Gated(OpFunction):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, tanh: bool | None) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.tanh = tanh
        return _swiglu(gate, up) if tanh is None else _geglu(gate, up, tanh)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        gate, up = ctx.saved_tensors
        # The reference is made of differentiable operations: higher derivatives are torch's own.
        if torch.is_grad_enabled():
            return *_reference_backward(dy, gate, up, ctx.tanh), None
        if ctx.tanh is None:
            return *_swiglu_backward(dy, gate, up), None
        return *_geglu_backward(dy, gate, up, ctx.tanh), None
