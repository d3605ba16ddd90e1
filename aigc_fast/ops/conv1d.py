"""Convolutions along time with what vocoders have around them, in one pass."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from aigc_fast.ops._autograd import OpFunction, asked_for, wanted
from aigc_fast.ops._conv1d import (
    conv1d_backward_weight,
    conv1d_gated,
    conv_transpose1d_gated,
    leaky_relu,
    leaky_relu_backward,
)
from aigc_fast.ops._layout import channels_innermost


def conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residuals: Sequence[Tensor] = (),
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    slope: float = 1.0,
    gain: float = 1.0,
) -> Tensor:
    """y = gain * (conv(leaky_relu(x, slope), weight) + bias + sum of residuals).

    x:         (batch, in, time), float64/32/16 or bfloat16, of any strides; read fastest where
               channels are innermost, as in the result.
    weight:    (out, in, taps), dtype of x, of any strides.
    bias:      (out,), dtype of x, or None.
    residuals: up to three tensors of the result's shape and dtype.
    stride:    steps of x between two steps of the result.
    padding:   zeros before and after every sequence.
    dilation:  steps between two taps.
    slope:     factor on negative values of x: 1 leaves them, 0 is a ReLU.
    gain:      factor on the result.

    Returns (batch, out, (time + 2 * padding - dilation * (taps - 1) - 1) // stride + 1), channels
    innermost in memory.
    Computes in fp32 (fp64 for fp64) and rounds once; bfloat16 on a CPU is rounded once more between
    leaky_relu and the products. Bytes that must move: x, residuals and y once.

    Differentiable to any order in all tensors: of y = conv(x, weight), linear in both, the gradient
    of x is a transposed convolution of that of y, and the gradient of weight a third operator;
    their own derivatives are these three again.

    Raises TypeError or ValueError for a wrong dtype, shape or device.
    """
    places = _Places(False, stride, padding, dilation)
    return _convolve(places, x, weight, bias, slope, gain, *residuals)


def conv_transpose1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    slope: float = 1.0,
    output_padding: int = 0,
    dilation: int = 1,
) -> Tensor:
    """y = conv_transpose(leaky_relu(x, slope), weight) + bias: `stride` outputs for every input.

    x, bias, slope: as for `conv1d`.
    weight:  (in, out, taps), dtype of x, of any strides.
    stride:  steps of the result between two inputs. Every stride-th output is one convolution of
             the inputs, with every stride-th tap: no product with an inserted zero is made.
    padding: steps left out at the beginning and at the end of the result.
    output_padding: steps added at the end of the result, fewer than stride.
    dilation: steps of the result between two taps.

    Returns (batch, out, (time - 1) * stride + dilation * (taps - 1) + 1 - 2 * padding +
    output_padding), channels innermost in memory.
    Arithmetic, derivatives and errors as for `conv1d`.
    """
    places = _Places(True, stride, padding, dilation, output_padding)
    return _convolve(places, x, weight, bias, slope, 1.0)


class _Places(NamedTuple):
    """Where taps read, of a convolution, or of a transposed one write."""

    transposed: bool
    stride: int
    padding: int
    dilation: int
    output_padding: int = 0

    def run(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        residuals: Sequence[Tensor] = (),
        slope: float = 1.0,
        gain: float = 1.0,
        gate: Tensor | None = None,
        gate_slope: float = 1.0,
    ) -> Tensor:
        """One operator. gate: a tensor of the result's shape, by the derivative of whose leaky ReLU
        the result is multiplied."""
        _, *places, more = self
        if self.transposed:
            stride, padding, dilation = places
            return conv_transpose1d_gated(
                x, weight, bias, stride, padding, slope, more, dilation, gate, gate_slope
            )
        return conv1d_gated(
            x, weight, bias, list(residuals), *places, slope, gain, gate, gate_slope
        )

    def weight_gradient(self, grad: Tensor, x: Tensor, taps: int, slope: float = 1.0) -> Tensor:
        """One operator, of the result's gradient."""
        _, *places, _ = self
        if self.transposed:  # taps read the longer of the two
            return conv1d_backward_weight(x, grad, taps, *places, slope, 1.0)
        return conv1d_backward_weight(grad, x, taps, *places, 1.0, slope)

    def adjoint(self, x: Tensor, taps: int) -> "_Places":
        """Those by which the gradient of the result becomes that of x."""
        if self.transposed:
            return self._replace(transposed=False, output_padding=0)
        beyond = x.shape[2] + 2 * self.padding - self.dilation * (taps - 1) - 1
        return self._replace(transposed=True, output_padding=beyond % self.stride)


def _convolve(
    places: _Places,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    slope: float = 1.0,
    gain: float = 1.0,
    *residuals: Tensor,
) -> Tensor:
    if wanted(x, weight, bias, *residuals):
        return _Convolution.call(places, x, weight, bias, slope, gain, *residuals)
    return places.run(x, weight, bias, residuals, slope, gain)


def _input_gradient(
    places: _Places, grad: Tensor, weight: Tensor, x: Tensor, slope: float
) -> Tensor:
    back = places.adjoint(x, weight.shape[2])
    if not wanted(grad, weight):
        return back.run(grad, weight, gate=None if slope == 1 else x, gate_slope=slope)
    return leaky_relu_backward(_convolve(back, grad, weight), x, slope)


def _weight_gradient(places: _Places, grad: Tensor, x: Tensor, taps: int, slope: float) -> Tensor:
    if wanted(grad, x):
        return _WeightGradient.call(places, grad, leaky_relu(x, slope), taps)
    return places.weight_gradient(grad, x, taps, slope)


class _Convolution(OpFunction):
    @staticmethod
    def forward(
        ctx: Any,
        places: _Places,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        slope: float,
        gain: float,
        *residuals: Tensor,
    ) -> Tensor:
        ctx.places, ctx.slope, ctx.gain = places, slope, gain
        ctx.save_for_backward(x, weight)
        return places.run(x, weight, bias, residuals, slope, gain)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        _, by_x, by_weight, by_bias, _, _, *by_residuals = asked_for(ctx)
        grad = channels_innermost(grad)  # as all below read it fastest
        if ctx.gain != 1:
            grad = grad * ctx.gain
        return (
            None,
            _input_gradient(ctx.places, grad, weight, x, ctx.slope) if by_x else None,
            _weight_gradient(ctx.places, grad, x, weight.shape[2], ctx.slope)
            if by_weight
            else None,
            grad.sum((0, 2)) if by_bias else None,
            None,
            None,
            *(grad if asked else None for asked in by_residuals),
        )


class _WeightGradient(OpFunction):
    @staticmethod
    def forward(ctx: Any, places: _Places, grad: Tensor, x: Tensor, taps: int) -> Tensor:
        ctx.places = places
        ctx.save_for_backward(grad, x)
        return places.weight_gradient(grad, x, taps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (by_result,), (grad, x) = grads, ctx.saved_tensors
        _, by_grad, by_x, _ = asked_for(ctx)
        back = ctx.places.adjoint(x, by_result.shape[2])
        return (
            None,
            _convolve(ctx.places, x, by_result) if by_grad else None,
            _convolve(back, grad, by_result) if by_x else None,
            None,
        )
