"""The losses of adversarial training, their mean over the logits and its gradient.

Every one of them is a mean of phi(offset + sign * x) over real logits, the same over generated
ones, or both; the relativistic one has for x the difference of a pair. A program adds every
PROGRAMS-th block, and leaves its sums; there are few logits, so that one program is the rule.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .math import fp32, softplus
from .optional import contiguous

#: registers a thread and bytes of shared memory that a kernel may take; spills are never allowed
BUDGET = {"_forward": (80, 1024), "_backward": (56, 0)}

_BLOCK = 1024
_PROGRAMS = 256

# numbers of the operator's schema
_SQUARE, _HINGE, _WASSERSTEIN, _RELATIVISTIC = 1, 2, 3, 4


@triton.jit
def _value(u, PHI: tl.constexpr):
    if PHI == "softplus":
        return softplus(u)
    elif PHI == "half_square":
        return 0.5 * u * u
    elif PHI == "relu":
        return tl.where(u < 0, 0.0, u)
    else:
        return u


@triton.jit
def _slope(u, PHI: tl.constexpr):
    if PHI == "softplus":
        return tl.sigmoid(u)
    elif PHI == "half_square":
        return u
    elif PHI == "relu":
        return tl.where(u > 0, 1.0, 0.0)
    else:
        return tl.where(u == u, 1.0, 1.0)


@triton.jit
def _sum(x_ptr, minus_ptr, size, offset, sign, PHI: tl.constexpr, PAIRED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip  # noqa: E501
    """Of phi over this program's blocks of x, or of x - minus."""
    total = tl.zeros((BLOCK,), tl.float32)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, size, step):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, at < size, 0.0).to(tl.float32)
        if PAIRED:
            x -= tl.load(minus_ptr + at, at < size, 0.0).to(tl.float32)
        total += tl.where(at < size, _value(offset + sign * x, PHI), 0.0)
    return tl.sum(total, 0)


@triton.jit
def _forward(
    real_ptr, fake_ptr, out_ptr, real_size, fake_size, real_offset, fake_offset, sign,
    PHI: tl.constexpr, PAIRED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sign, fake_offset = fp32(sign), fp32(fake_offset)
    result = _sum(fake_ptr, real_ptr, fake_size, fake_offset, sign, PHI, PAIRED, BLOCK)
    result /= fake_size
    if real_ptr is not None and not PAIRED:
        of_real = _sum(real_ptr, real_ptr, real_size, fp32(real_offset), -1.0, PHI, False, BLOCK)
        result += of_real / real_size
    tl.store(out_ptr + tl.program_id(0), result)


@triton.jit
def _backward(
    grad_ptr, real_ptr, fake_ptr, to_real_ptr, to_fake_ptr, real_size, fake_size, real_offset,
    fake_offset, sign, PHI: tl.constexpr, PAIRED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    grad, sign = tl.load(grad_ptr).to(tl.float32), fp32(sign)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(fake_ptr + at, at < fake_size, 0.0).to(tl.float32)
    if real_ptr is not None:
        real = tl.load(real_ptr + at, at < real_size, 0.0).to(tl.float32)
    if PAIRED:
        x -= real
    g = _slope(fp32(fake_offset) + sign * x, PHI) * (sign * grad / fake_size)
    tl.store(to_fake_ptr + at, g.to(to_fake_ptr.dtype.element_ty), at < fake_size)
    if real_ptr is not None:
        if PAIRED:
            g = -g
        else:
            g = _slope(fp32(real_offset) - real, PHI) * (-grad / real_size)
        tl.store(to_real_ptr + at, g.to(to_real_ptr.dtype.element_ty), at < real_size)


def _options(loss: int, generator: bool) -> tuple[tuple, dict]:
    """(offset of real, offset of fake, sign of fake) and what is compiled in."""
    phi, offsets = "softplus", (0.0, 0.0)
    if loss == _SQUARE:
        phi, offsets = "half_square", (0.0, 1.0) if generator else (1.0, 0.0)
    elif loss == _WASSERSTEIN or (loss == _HINGE and generator):
        phi = "identity"
    elif loss == _HINGE:
        phi, offsets = "relu", (1.0, 1.0)
    return (*offsets, -1.0 if generator else 1.0), {
        "PHI": phi, "PAIRED": loss == _RELATIVISTIC, "BLOCK": _BLOCK,
    }  # fmt: skip


def gan_loss(real: Tensor | None, fake: Tensor, loss: int, generator: bool) -> Tensor:
    numbers, options = _options(loss, generator)
    fake, real = contiguous(fake, real)
    sizes = 0 if real is None else real.numel(), fake.numel()
    programs = min(triton.cdiv(max(sizes), _BLOCK), _PROGRAMS)
    out = fake.new_empty(programs, dtype=torch.float32)
    _forward[(programs,)](real, fake, out, *sizes, *numbers, **options)
    return out.view(()) if programs == 1 else out.sum()


def gan_loss_backward(
    grad: Tensor, real: Tensor | None, fake: Tensor, loss: int, generator: bool
) -> tuple[Tensor, Tensor]:
    numbers, options = _options(loss, generator)
    fake, real = contiguous(fake, real)
    to_fake = torch.empty_like(fake)
    to_real = fake.new_empty(0) if real is None else torch.empty_like(real)
    sizes = 0 if real is None else real.numel(), fake.numel()
    grid = (triton.cdiv(max(sizes), _BLOCK),)
    _backward[grid](grad, real, fake, to_real, to_fake, *sizes, *numbers, **options)
    return to_real, to_fake
