"""Monotonic rational-quadratic splines (Durkan et al. 2019, arXiv:1906.04032), backwards."""

from math import exp, log

import torch
import torch.nn.functional as F
from torch import Tensor

#: beyond it the spline is the identity
BOUND = 5.0
#: of widths and heights, as parts of all, and of slopes
SMALLEST = 1e-3


def inverse_spline(y: Tensor, widths: Tensor, heights: Tensor, slopes: Tensor) -> Tensor:
    """The x at which a spline is y.

    y:       (...); widths, heights: (..., bins), logits of the parts of [-5, 5] between knots;
    slopes:  (..., bins - 1), before a softplus: of the inner knots. At the outer ones it is 1.

    In a bin from (x0, y0), w wide and h high, with slopes d0 and d1 at its ends and s = h / w:

        y = y0 + h (s t^2 + d0 t (1 - t)) / (s + (d0 + d1 - 2 s) t (1 - t)),    t = (x - x0) / w

    of which t is the root of a quadratic equation. Computes in float32, or float64 for that.
    """
    dtype = y.dtype
    wide = torch.promote_types(dtype, torch.float32)
    y, widths, heights, slopes = (tensor.to(wide) for tensor in (y, widths, heights, slopes))
    x_edges, y_edges = _edges(widths), _edges(heights)
    outer = log(exp(1 - SMALLEST) - 1)  # of which softplus makes a slope of 1
    slopes = SMALLEST + F.softplus(F.pad(slopes, (1, 1), value=outer))
    inside = y.clamp(-BOUND, BOUND)
    index = (inside[..., None] >= y_edges[..., 1:-1]).sum(-1, keepdim=True)

    def pick(values: Tensor, shift: int = 0) -> Tensor:
        return values.gather(-1, index + shift)[..., 0]

    x0, y0, d0, d1 = pick(x_edges), pick(y_edges), pick(slopes), pick(slopes, 1)
    w, h = pick(x_edges, 1) - x0, pick(y_edges, 1) - y0
    s = h / w
    above = inside - y0
    bend = above * (d0 + d1 - 2 * s)
    a, b, c = h * (s - d0) + bend, h * d0 - bend, -s * above
    # A rounding error must not make it negative, where it is 0.
    discriminant = (b * b - 4 * a * c).clamp_min(0)
    x = 2 * c / (-b - discriminant.sqrt()) * w + x0
    return torch.where(y.abs() <= BOUND, x, y).to(dtype)


def _edges(logits: Tensor) -> Tensor:
    """The knots, (..., bins + 1), from -5 to 5."""
    parts = SMALLEST + (1 - SMALLEST * logits.shape[-1]) * logits.softmax(-1)
    inner = 2 * BOUND * parts.cumsum(-1)[..., :-1] - BOUND
    return F.pad(F.pad(inner, (1, 0), value=-BOUND), (0, 1), value=BOUND)
