"""Rotary position embedding."""

from typing import Any

import torch
from torch import Tensor

from aigc_fast.ops._autograd import OpFunction
from aigc_fast.ops._checks import check_device, check_tensor, name_of
from aigc_fast.ops._layout import wide
from aigc_fast.ops._registry import define


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Turns pairs of features by the angles of their position:

        (a, b) -> (a cos - b sin, b cos + a sin)

    x:           (batch, seq, heads, head_dim), float64/32/16 or bfloat16, of any strides: query and
                 key heads may be one view of a packed projection. The result is contiguous.
    cos, sin:    (seq, r / 2), or (batch, seq, r / 2) where sequences stand at different positions;
                 float32 or the dtype of x (float64 for float64). r <= head_dim is the rotated part,
                 the features behind it pass unchanged.
    interleaved: the pair is (2i, 2i + 1), as in GPT-J and GGML; else (i, i + r / 2), as in Llama's
                 weights of transformers and GPT-NeoX.

    Computes in fp32 (fp64 for fp64) and rounds once. cos and sin are constants. Backward is the
    rotation back, and saves nothing beside the angles. Bytes that must move: 2 times x.

    Raises TypeError or ValueError for a wrong dtype, shape or device, RuntimeError where cos or sin
    requires a gradient.

    Source: Su et al. 2021, arXiv:2104.09864.
    """
    if torch.is_grad_enabled():
        if cos.requires_grad or sin.requires_grad:
            raise RuntimeError(
                "apply_rotary has no derivative with respect to cos and sin: pass them detached"
            )
        if x.requires_grad:
            return _ApplyRotary.call(x, cos, sin, interleaved, False)
    return _apply_rotary(x, cos, sin, True) if interleaved else _apply_rotary(x, cos, sin)


def _reference(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, inverse: bool = False
) -> Tensor:
    rotated = 2 * cos.shape[-1]
    turning = wide(x[..., :rotated])
    cos, sin = (t.to(turning.dtype).unsqueeze(-2) for t in (cos, -sin if inverse else sin))
    if interleaved:
        a, b = turning[..., 0::2], turning[..., 1::2]
    else:
        a, b = turning.chunk(2, -1)
    pair = (a * cos - b * sin, b * cos + a * sin)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([turned.to(x.dtype), x[..., rotated:]], -1).contiguous()


def _check(x: Tensor, cos: Tensor, sin: Tensor, *_: Any) -> None:
    check_tensor("x", x, ndim=4)
    check_angles(("x", x), cos, sin)


def check_angles(of: tuple[str, Tensor], cos: Tensor, sin: Tensor) -> None:
    """Refuses cos and sin that are not angles of the tensor (batch, seq, heads, head_dim)."""
    name, x = of
    angles = (x.dtype,) if x.dtype == torch.float64 else (torch.float32, x.dtype)
    if isinstance(cos, Tensor) and cos.dtype not in angles:
        names = " or ".join(dict.fromkeys(map(name_of, angles)))
        raise TypeError(f"cos must be {names}, got {name_of(cos.dtype)}")
    check_tensor("cos", cos)
    batch, seq, _heads, head_dim = x.shape
    check_device("cos", cos, (name, x))
    if cos.dim() not in (2, 3) or cos.shape[:-1] not in ((seq,), (batch, seq)):
        raise ValueError(
            f"cos must have shape ({seq}, r / 2) or ({batch}, {seq}, r / 2) for {name} (batch, "
            f"seq, heads, head_dim) of shape {tuple(x.shape)}, got {tuple(cos.shape)}"
        )
    if 2 * cos.shape[-1] > head_dim:
        raise ValueError(
            f"cos must have at most head_dim / 2 = {head_dim // 2} columns, got {cos.shape[-1]}"
        )
    check_tensor("sin", sin, like=("cos", cos), shape=cos.shape)


_apply_rotary = define(
    # A scalar costs 0.3 us to hand over, one left at its default nothing.
    "apply_rotary(Tensor x, Tensor cos, Tensor sin, bool interleaved=False, bool inverse=False)"
    " -> Tensor",
    _reference,
    _check,
    stem="rotary",
)


class _ApplyRotary(OpFunction):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool
    ) -> Tensor:
        ctx.options = interleaved, not inverse
        ctx.save_for_backward(cos, sin)
        return _apply_rotary(x, cos, sin, interleaved, inverse)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        run = _ApplyRotary.call if torch.is_grad_enabled() else _apply_rotary
        return run(dy, *ctx.saved_tensors, *ctx.options), None, None, None, None
