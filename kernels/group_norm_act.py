"""y = act(group_norm(x) * weight + bias) and its derivative.

A group that fits a tile is one program (_whole). Others are cut into pieces of positions, so that
few groups still fill the machine: _moments leaves mean and squared differences of each channel's
piece, _merge those of each group, _apply writes y. In backward _sums leaves what each channel's
pieces add up to and _gradient writes dx.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .channel_tiles import Layout, ordered, tile
from .math import fp32
from .optional import contiguous, value_or
from .smooth_activation import activate

#: registers a thread and bytes of shared memory that a kernel may take; spills are never allowed
BUDGET = {
    "_whole": (112, 1024),
    "_moments": (136, 1024),
    "_merge": (48, 1024),
    "_apply": (96, 1024),
    "_sums": (216, 1024),  # with triton 3.6, 192 with 3.9; from 169 to 255 an SM takes two blocks
    "_gradient": (136, 1024),
}

_WHOLE = 8192  # elements of a group's tile in _whole


@triton.jit
def _act(x, ACT: tl.constexpr):
    """act(x) and its derivative."""
    if ACT == 0:
        return x, tl.where(x == x, 1.0, 1.0)
    else:
        return activate(x, ACT - 1)


@triton.jit
def _whole(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, groups, width, positions, c_stride,
    p_stride, eps, ACT: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    inside = tl.arange(0, BLOCK_C)[:, None]
    channel, position = pid % groups * width + inside, tl.arange(0, BLOCK_P)[None, :]
    mask = (inside < width) & (position < positions)
    at = pid // groups * groups * width * positions + channel * c_stride + position * p_stride
    x = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
    size = width * positions
    mean = tl.sum(x) / size
    # The differences are taken twice: what the mean's rounding left over goes to the mean.
    mean += tl.sum(tl.where(mask, x - mean, 0.0)) / size
    centred = tl.where(mask, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred) / size + fp32(eps))
    weight = value_or(weight_ptr, channel, inside < width, 1.0)
    bias = value_or(bias_ptr, channel, inside < width, 0.0)
    y, _ = _act(centred * (rstd * weight) + bias, ACT)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask)
    tl.store(mean_ptr + pid, mean)
    tl.store(rstd_ptr + pid, rstd)


@triton.jit
def _moments(
    x_ptr, mean_ptr, squares_ptr, channels, positions, pieces, piece_size, c_stride, p_stride,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    sample, channel, piece = tile(channels, pieces, BLOCK_C)
    first = piece * piece_size
    last = tl.minimum(first + piece_size, positions)
    position = tl.arange(0, BLOCK_P)[None, :]
    x_ptr += sample * channels * positions + channel * c_stride
    # Welford's update in every lane; the lanes are merged in the end.
    mean = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    squares = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for start in range(first, last, BLOCK_P):
        count = (start - first) // BLOCK_P + 1
        at = start + position
        mask = (at < last) & (channel < channels)
        x = tl.load(x_ptr + at * p_stride, mask, 0.0).to(tl.float32)
        delta = tl.where(mask, x - mean, 0.0)
        mean += delta * (1.0 / count)
        squares += delta * tl.where(mask, x - mean, 0.0)
    counts = tl.maximum(tl.cdiv(last - first - position, BLOCK_P), 0).to(tl.float32)
    total = (last - first).to(tl.float32)
    centre = tl.sum(mean * counts, 1)[:, None] / total
    apart = mean - centre
    merged = tl.sum(squares + apart * apart * counts, 1)[:, None]
    to = (sample * channels + channel) * pieces + piece
    tl.store(mean_ptr + to, centre, channel < channels)
    tl.store(squares_ptr + to, merged, channel < channels)


@triton.jit
def _merge(
    part_mean_ptr, part_squares_ptr, mean_ptr, rstd_ptr, width, positions, pieces, piece_size, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    parts = width * pieces
    lane = tl.arange(0, BLOCK)
    part_mean_ptr += pid * parts
    part_squares_ptr += pid * parts
    size = width * (positions * 1.0)  # what is 1 comes as a constant, which has no .to
    mean = tl.zeros([BLOCK], tl.float32)
    for start in range(0, parts, BLOCK):
        at = start + lane
        count = tl.minimum(positions - at % pieces * piece_size, piece_size).to(tl.float32)
        mean += tl.load(part_mean_ptr + at, at < parts, 0.0) * (count / size)
    centre = tl.sum(mean)
    squares = tl.zeros([BLOCK], tl.float32)
    rest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, parts, BLOCK):
        at = start + lane
        count = tl.minimum(positions - at % pieces * piece_size, piece_size).to(tl.float32)
        apart = tl.load(part_mean_ptr + at, at < parts, 0.0) - centre
        apart = tl.where(at < parts, apart, 0.0)
        squares += tl.load(part_squares_ptr + at, at < parts, 0.0) + apart * apart * count
        rest += apart * count
    tl.store(mean_ptr + pid, centre + tl.sum(rest) / size)
    tl.store(rstd_ptr + pid, 1.0 / tl.sqrt(tl.sum(squares) / size + fp32(eps)))


@triton.jit
def _apply(
    x_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, y_ptr, channels, width, positions, pieces,
    c_stride, p_stride, ACT: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    sample, channel, piece = tile(channels, pieces, BLOCK_C)
    # Backwards: what the pass before read last is still in the L2 cache.
    sample = tl.num_programs(0) // (pieces * tl.cdiv(channels, BLOCK_C)) - 1 - sample
    position = (pieces - 1 - piece) * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    known = channel < channels
    mask = known & (position < positions)
    group = (sample * channels + channel) // width
    mean, rstd = tl.load(mean_ptr + group, known, 0.0), tl.load(rstd_ptr + group, known, 0.0)
    weight = value_or(weight_ptr, channel, known, 1.0)
    bias = value_or(bias_ptr, channel, known, 0.0)
    at = sample * channels * positions + channel * c_stride + position * p_stride
    x = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
    y, _ = _act((x - mean) * (rstd * weight) + bias, ACT)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _terms(x_ptr, dy_ptr, at, mask, mean, rstd, weight, bias, ACT: tl.constexpr):
    """The normalised x, and dy times the activation's slope."""
    normed = (tl.load(x_ptr + at, mask, 0.0).to(tl.float32) - mean) * rstd
    dy = tl.load(dy_ptr + at, mask, 0.0).to(tl.float32)
    _, slope = _act(normed * weight + bias, ACT)
    return normed, tl.where(mask, dy * slope, 0.0)


@triton.jit
def _sums(
    x_ptr, dy_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, part_ptr, channels, width, positions,
    pieces, piece_size, c_stride, p_stride, ACT: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    sample, channel, piece = tile(channels, pieces, BLOCK_C)
    first = piece * piece_size
    last = tl.minimum(first + piece_size, positions)
    known = channel < channels
    group = (sample * channels + channel) // width
    mean, rstd = tl.load(mean_ptr + group, known, 0.0), tl.load(rstd_ptr + group, known, 0.0)
    weight = value_or(weight_ptr, channel, known, 1.0)
    bias = value_or(bias_ptr, channel, known, 0.0)
    grads = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    products = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for start in range(first, last, BLOCK_P):
        position = start + tl.arange(0, BLOCK_P)[None, :]
        at = sample * channels * positions + channel * c_stride + position * p_stride
        mask = known & (position < last)
        normed, grad = _terms(x_ptr, dy_ptr, at, mask, mean, rstd, weight, bias, ACT)
        grads += grad
        products += tl.where(mask, grad * normed, 0.0)
    to = part_ptr + ((sample * channels + channel) * pieces + piece) * 2
    tl.store(to, tl.sum(grads, 1)[:, None], known)
    tl.store(to + 1, tl.sum(products, 1)[:, None], known)


@triton.jit
def _gradient(
    x_ptr, dy_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, sums_ptr, dx_ptr, channels, width,
    positions, pieces, c_stride, p_stride, ACT: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    sample, channel, piece = tile(channels, pieces, BLOCK_C)
    position = piece * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    known = channel < channels
    mask = known & (position < positions)
    group = (sample * channels + channel) // width
    mean, rstd = tl.load(mean_ptr + group, known, 0.0), tl.load(rstd_ptr + group, known, 0.0)
    weight = value_or(weight_ptr, channel, known, 1.0)
    bias = value_or(bias_ptr, channel, known, 0.0)
    grads = tl.load(sums_ptr + group * 2, known, 0.0)
    products = tl.load(sums_ptr + group * 2 + 1, known, 0.0)
    at = sample * channels * positions + channel * c_stride + position * p_stride
    normed, grad = _terms(x_ptr, dy_ptr, at, mask, mean, rstd, weight, bias, ACT)
    dx = (grad * weight - grads - normed * products) * rstd
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask)


# ---- launchers ------------------------------------------------------------------------------


def group_norm_act(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, eps: float, act: int
) -> tuple[Tensor, Tensor, Tensor]:
    x = ordered(x)
    y = torch.empty_like(x)
    mean = x.new_zeros(x.shape[0], num_groups, dtype=torch.float32)
    rstd = torch.zeros_like(mean)
    if not x.numel():
        return y, mean, rstd
    t = Layout(x, num_groups)
    params = contiguous(weight, bias)
    block_c, block_p = triton.next_power_of_2(t.width), triton.next_power_of_2(t.positions)
    if block_c * block_p <= _WHOLE:
        warps = max(1, min(16, block_c * block_p // 512))
        _whole[(mean.numel(),)](x, *params, y, mean, rstd, t.groups, t.width, t.positions,
                                *t.strides, float(eps), ACT=act, BLOCK_C=block_c,
                                BLOCK_P=block_p, num_warps=warps)  # fmt: skip
        return y, mean, rstd
    part = x.new_empty(2, t.batch * t.channels * t.pieces, dtype=torch.float32)
    _moments[t.sums_grid](x, part[0], part[1], t.channels, t.positions, t.pieces, t.piece_size,
                          *t.strides, **t.blocks)  # fmt: skip
    block = min(triton.next_power_of_2(t.width * t.pieces), 1024)
    _merge[(mean.numel(),)](part[0], part[1], mean, rstd, t.width, t.positions, t.pieces,
                            t.piece_size, float(eps), BLOCK=block)  # fmt: skip
    _apply[t.map_grid](x, *params, mean, rstd, y, t.channels, t.width, t.positions, t.tiles,
                       *t.strides, ACT=act, **t.blocks)  # fmt: skip
    return y, mean, rstd


def group_norm_act_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None,
    num_groups: int, act: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x = ordered(x)
    dx = torch.empty_like(x)
    if dy.stride() != x.stride():
        dy = torch.empty_like(x).copy_(dy)
    mean, rstd = mean.contiguous(), rstd.contiguous()
    t = Layout(x, num_groups) if x.numel() else None
    part = x.new_zeros(x.shape[0], x.shape[1], t.pieces if t else 1, 2, dtype=torch.float32)
    params = contiguous(weight, bias)
    if t:
        _sums[t.sums_grid](x, dy, *params, mean, rstd, part, t.channels, t.width, t.positions,
                           t.pieces, t.piece_size, *t.strides, ACT=act, **t.blocks)  # fmt: skip
        channel = part.sum(2)
        weighted = channel if weight is None else channel * weight.float()[:, None]
        size = t.width * t.positions
        group = weighted.view(t.batch, num_groups, t.width, 2).sum(2) / size
        _gradient[t.map_grid](x, dy, *params, mean, rstd, group, dx, t.channels, t.width,
                              t.positions, t.tiles, *t.strides, ACT=act, **t.blocks)  # fmt: skip
    total = part.sum((0, 2)).to(x.dtype)
    dweight = x.new_empty(0) if weight is None else total[:, 1].contiguous()
    return dx, dweight, x.new_empty(0) if bias is None else total[:, 0].contiguous()
