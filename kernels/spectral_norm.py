"""Spectral normalisation of many weights in a few launches, and its derivative.

The weights, packed into one tensor, are matrices of which a table says where each begins and how
large it is. A program takes a piece of any of them; a second table names its matrix and the first
of its rows, columns or elements. Both tables depend on the shapes alone and are kept.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .math import fp32
from .memory_order import contiguous_like

#: registers a thread and bytes of shared memory that a kernel may take; spills are never allowed
BUDGET = {
    "_product": (96, 1024),
    "_normalize": (56, 64),
    "_dot": (56, 64),
    "_divide": (48, 0),
    "_inner": (48, 64),
    "_factor": (56, 64),
    "_gradient": (80, 0),
}

_PIECE = 1024  # elements of a piece
#: outputs and inner elements of a tile in W v, where rows are outputs, and in W' u
_ROWS, _COLUMNS = {"BLOCK_O": 4, "BLOCK_I": 512}, {"BLOCK_O": 64, "BLOCK_I": 32}
# Members of the first table's rows.
_AT = tl.constexpr(0)
_HEIGHT = tl.constexpr(1)
_WIDTH = tl.constexpr(2)
_U = tl.constexpr(3)
_V = tl.constexpr(4)
_FIRST = tl.constexpr(5)  # of the pieces
_PIECES = tl.constexpr(6)
_MEMBERS = tl.constexpr(8)


@triton.jit
def _member(table_ptr, layer, member):
    return tl.load(table_ptr + layer * _MEMBERS + member)


@triton.jit
def _piece(table_ptr, units_ptr, BLOCK: tl.constexpr):
    """This program's matrix, and the elements of it that it takes."""
    pid = tl.program_id(0)
    layer, first = tl.load(units_ptr + pid * 2), tl.load(units_ptr + pid * 2 + 1)
    at = first + tl.arange(0, BLOCK)
    size = _member(table_ptr, layer, _HEIGHT) * _member(table_ptr, layer, _WIDTH)
    return layer, at, at < size


@triton.jit
def _product(
    w_ptr, x_ptr, y_ptr, table_ptr, units_ptr, TRANSPOSED: tl.constexpr, BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):  # fmt: skip
    """y = W x, or W' x: some rows, or columns, of one matrix."""
    pid = tl.program_id(0)
    layer, first = tl.load(units_ptr + pid * 2), tl.load(units_ptr + pid * 2 + 1)
    height, width = _member(table_ptr, layer, _HEIGHT), _member(table_ptr, layer, _WIDTH)
    u_at, v_at = _member(table_ptr, layer, _U), _member(table_ptr, layer, _V)
    w_ptr += _member(table_ptr, layer, _AT)
    if TRANSPOSED:
        outer, inner, x_at, y_at, o_stride, i_stride = width, height, u_at, v_at, 1, width
    else:
        outer, inner, x_at, y_at, o_stride, i_stride = height, width, v_at, u_at, width, 1
    o = first + tl.arange(0, BLOCK_O)
    total = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    for start in range(0, inner, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        mask = (o < outer)[:, None] & (i < inner)[None, :]
        w = tl.load(w_ptr + o[:, None] * o_stride + i[None, :] * i_stride, mask, 0.0)
        total += w.to(tl.float32) * tl.load(x_ptr + x_at + i, i < inner, 0.0)[None, :]
    tl.store(y_ptr + y_at + o, tl.sum(total, 1), o < outer)


@triton.jit
def _normalize(
    x_ptr, sigma_ptr, table_ptr, eps, START: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """x / max(|x|, eps) of one matrix; the last one leaves sigma, too."""
    layer = tl.program_id(0)
    size = _member(table_ptr, layer, SIZE)
    x_ptr += _member(table_ptr, layer, START)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + i, i < size, 0.0)
        squares += x * x
    length = tl.sqrt(tl.sum(squares))
    divisor = tl.maximum(length, fp32(eps))
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        tl.store(x_ptr + i, tl.load(x_ptr + i, i < size, 0.0) / divisor, i < size)
    tl.store(sigma_ptr + layer, length * (length / divisor))


@triton.jit
def _dot(u_ptr, product_ptr, sigma_ptr, table_ptr, BLOCK: tl.constexpr):
    layer = tl.program_id(0)
    size, at = _member(table_ptr, layer, _HEIGHT), _member(table_ptr, layer, _U)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        u = tl.load(u_ptr + at + i, i < size, 0.0)
        total += u * tl.load(product_ptr + at + i, i < size, 0.0)
    tl.store(sigma_ptr + layer, tl.sum(total))


@triton.jit
def _divide(w_ptr, sigma_ptr, out_ptr, table_ptr, units_ptr, BLOCK: tl.constexpr):
    layer, i, mask = _piece(table_ptr, units_ptr, BLOCK)
    at = _member(table_ptr, layer, _AT) + i
    w = tl.load(w_ptr + at, mask, 0.0).to(tl.float32) / tl.load(sigma_ptr + layer)
    tl.store(out_ptr + at, w.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _inner(w_ptr, g_ptr, part_ptr, table_ptr, units_ptr, BLOCK: tl.constexpr):
    layer, i, mask = _piece(table_ptr, units_ptr, BLOCK)
    at = _member(table_ptr, layer, _AT) + i
    w = tl.load(w_ptr + at, mask, 0.0).to(tl.float32)
    g = tl.load(g_ptr + at, mask, 0.0).to(tl.float32)
    tl.store(part_ptr + tl.program_id(0), tl.sum(w * g))


@triton.jit
def _factor(part_ptr, ds_ptr, sigma_ptr, factor_ptr, table_ptr, BLOCK: tl.constexpr):
    """What u v' is multiplied by."""
    layer = tl.program_id(0)
    first, pieces = _member(table_ptr, layer, _FIRST), _member(table_ptr, layer, _PIECES)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, pieces, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(part_ptr + first + i, i < pieces, 0.0)
    sigma = tl.load(sigma_ptr + layer).to(tl.float32)
    ds = tl.load(ds_ptr + layer).to(tl.float32)
    tl.store(factor_ptr + layer, ds - tl.sum(total) / (sigma * sigma))


@triton.jit
def _gradient(
    g_ptr, u_ptr, v_ptr, sigma_ptr, factor_ptr, out_ptr, table_ptr, units_ptr, BLOCK: tl.constexpr
):  # fmt: skip
    layer, i, mask = _piece(table_ptr, units_ptr, BLOCK)
    at, width = _member(table_ptr, layer, _AT) + i, _member(table_ptr, layer, _WIDTH)
    u = tl.load(u_ptr + _member(table_ptr, layer, _U) + i // width, mask, 0.0).to(tl.float32)
    v = tl.load(v_ptr + _member(table_ptr, layer, _V) + i % width, mask, 0.0).to(tl.float32)
    g = tl.load(g_ptr + at, mask, 0.0).to(tl.float32)
    dw = g / tl.load(sigma_ptr + layer).to(tl.float32) + tl.load(factor_ptr + layer) * (u * v)
    tl.store(out_ptr + at, dw.to(out_ptr.dtype.element_ty), mask)


# ---- launchers ------------------------------------------------------------------------------


class _Tables:
    """Where the matrices lie, and the pieces of them that programs take."""

    def __init__(self, shapes: tuple[tuple[int, int], ...], device: torch.device) -> None:
        rows, at, u, v, first = [], 0, 0, 0, 0
        for height, width in shapes:
            pieces = triton.cdiv(height * width, _PIECE)
            rows.append([at, height, width, u, v, first, pieces, 0])
            at, u, v, first = at + height * width, u + height, v + width, first + pieces

        def units(sizes: list[int], step: int) -> Tensor:
            found = [[layer, i] for layer, n in enumerate(sizes) for i in range(0, n, step)]
            return torch.tensor(found, device=device)

        self.matrices = torch.tensor(rows, device=device)
        self.lengths = [u, v]  # of all vectors
        self.by_rows = units([h for h, _ in shapes], _ROWS["BLOCK_O"])
        self.by_columns = units([w for _, w in shapes], _COLUMNS["BLOCK_O"])
        self.pieces = units([h * w for h, w in shapes], _PIECE)


@functools.cache  # one a network; CUDA graphs read it as long as they live
def _tables(shapes: tuple[tuple[int, int], ...], device: torch.device) -> _Tables:
    return _Tables(shapes, device)


def _tables_of(weights: list[Tensor]) -> _Tables:
    return _tables(tuple((len(w), w[0].numel()) for w in weights), weights[0].device)


def _pack(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def _unpack(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Tensors of their own: results must not share memory."""
    results = [contiguous_like(t) for t in like]
    parts = flat.split([t.numel() for t in like])
    torch._foreach_copy_(results, [p.view(t.shape) for p, t in zip(parts, like, strict=True)])
    return results


def spectral_norm(
    weights: list[Tensor], u: list[Tensor], v: list[Tensor], iterations: int, eps: float
) -> tuple[list[Tensor], Tensor, Tensor]:
    t, layers = _tables_of(weights), (len(weights),)
    packed, vectors = _pack(weights), _pack([*u, *v]).float()
    u_flat, v_flat = vectors.split(t.lengths)
    sigma = packed.new_empty(layers, dtype=torch.float32)

    def times_v(to: Tensor) -> None:
        grid = (len(t.by_rows),)
        _product[grid](packed, v_flat, to, t.matrices, t.by_rows, TRANSPOSED=False, **_ROWS)

    for _ in range(iterations):
        grid = (len(t.by_columns),)
        _product[grid](packed, u_flat, v_flat, t.matrices, t.by_columns, TRANSPOSED=True,
                       **_COLUMNS)  # fmt: skip
        _normalize[layers](v_flat, sigma, t.matrices, float(eps), START=4, SIZE=2, BLOCK=1024)
        times_v(u_flat)
        _normalize[layers](u_flat, sigma, t.matrices, float(eps), START=3, SIZE=1, BLOCK=1024)
    if iterations == 0:
        product = torch.empty_like(u_flat)
        times_v(product)
        _dot[layers](u_flat, product, sigma, t.matrices, BLOCK=1024)
    normal = torch.empty_like(packed)
    _divide[(len(t.pieces),)](packed, sigma, normal, t.matrices, t.pieces, BLOCK=_PIECE)
    dtype = packed.dtype
    return _unpack(normal, weights), sigma.to(dtype), vectors.to(dtype)


def spectral_norm_backward(
    grads: list[Tensor], grad_sigma: Tensor, weights: list[Tensor], vectors: Tensor, sigma: Tensor
) -> list[Tensor]:
    t = _tables_of(weights)
    u, v = vectors.contiguous().split(t.lengths)
    layers, pieces = (len(weights),), (len(t.pieces),)
    packed, g, sigma = _pack(weights), _pack(grads), sigma.contiguous()
    part = packed.new_empty(pieces, dtype=torch.float32)
    factor = packed.new_empty(layers, dtype=torch.float32)
    _inner[pieces](packed, g, part, t.matrices, t.pieces, BLOCK=_PIECE)
    _factor[layers](part, grad_sigma.contiguous(), sigma, factor, t.matrices, BLOCK=1024)
    out = torch.empty_like(packed)
    _gradient[pieces](g, u, v, sigma, factor, out, t.matrices, t.pieces, BLOCK=_PIECE)
    return _unpack(out, weights)
