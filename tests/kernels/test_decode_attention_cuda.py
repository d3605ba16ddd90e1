"""The CUDA kernels of decode_attention, run thread by thread on the CPU (cuda_on_cpu.h)."""

import ctypes

import pytest
import torch
from torch import Tensor

import aigc_fast
from aigc_fast import ops
from tests.kernels.cuda_on_cpu import DTYPES, build
from tests.ops.test_every_op import assert_as_good_as_torch

_POINTERS = "query keys values lengths out lse parts parts_lse"
_INTS = "q_len heads kv_heads head_dim capacity splits"
_LONGS = (
    "query_batch query_seq query_head query_dim key_batch key_seq key_head value_batch value_seq"
    " value_head lengths_stride batch"
)


class Arguments(ctypes.Structure):
    """struct DecodeAttention"""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS.split()),
        *((name, ctypes.c_int64) for name in _LONGS.split()),
        *((name, ctypes.c_int) for name in _INTS.split()),
        ("lengths_are_long", ctypes.c_bool),
        ("scale", ctypes.c_float),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    return build("decode_attention", tmp_path_factory)


def run(library, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, splits: int = 0):
    batch, q_len, heads, head_dim = query.shape
    out, lse = torch.empty(query.shape, dtype=query.dtype), torch.empty(query.shape[:3])
    p = Arguments(
        query.data_ptr(), keys.data_ptr(), values.data_ptr(), lengths.data_ptr(), out.data_ptr(),
        lse.data_ptr(), None, None, *query.stride(), *keys.stride()[:3], *values.stride()[:3],
        lengths.stride(0), batch, q_len, heads, keys.shape[2], head_dim, keys.shape[1], splits,
        lengths.dtype == torch.int64, head_dim**-0.5,
    )  # fmt: skip
    extents = [
        (sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1) * t.itemsize
        if t.numel() else 0
        for t in (query, keys, values, out, lse)
    ]  # fmt: skip
    library.run(DTYPES[query.dtype], p, (ctypes.c_int64 * 5)(*extents))
    return out, lse


def check(library, query, keys, values, lengths, splits=0) -> None:
    used = torch.arange(keys.shape[1]) < lengths[:, None]
    keys = keys.masked_fill_(~used[..., None, None], torch.nan)
    values = values.masked_fill_(~used[..., None, None], torch.nan)
    with aigc_fast.backend("reference"):
        exact = ops.decode_attention(
            query.double(), keys.double(), values.double(), lengths, return_lse=True
        )
        plain = ops.decode_attention(query, keys, values, lengths, return_lse=True)
    ours = run(library, query, keys, values, lengths, splits)
    assert_as_good_as_torch(list(ours), list(plain), list(exact), query.dtype)


# batch, q_len, heads, kv_heads, head_dim, capacity, lengths, splits
SHAPES = [
    (2, 1, 4, 2, 128, 200, [200, 77], 2),
    (1, 1, 3, 1, 64, 150, [131], 1),
    (2, 1, 2, 2, 64, 40, [0, 33], 1),
    (1, 1, 8, 1, 128, 300, [290], 3),
    (1, 2, 4, 2, 96, 90, [65], 1),
    (2, 4, 2, 1, 80, 70, [3, 64], 2),
    (1, 1, 2, 1, 256, 140, [129], 2),
    (1, 1, 8, 1, 256, 70, [66], 1),
    (1, 1, 1, 1, 8, 20, [1], 1),
    (1, 3, 2, 1, 72, 600, [513], 0),
    (1, 1, 5, 1, 200, 33, [32], 1),
    (1, 1, 4, 1, 128, 0, [0], 1),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(library, shape, dtype) -> None:
    batch, q_len, heads, kv_heads, head_dim, capacity, lengths, splits = shape
    check(
        library,
        torch.randn(batch, q_len, heads, head_dim).to(dtype),
        torch.randn(batch, capacity, kv_heads, head_dim).to(dtype),
        torch.randn(batch, capacity, kv_heads, head_dim).to(dtype),
        torch.tensor(lengths, dtype=torch.int32),
        splits,
    )


def test_strides(library) -> None:
    packed = torch.randn(2, 50, 2, 2, 64)
    query = torch.randn(4, 1, 64, 2).permute(3, 1, 0, 2)  # (2, 1, 4, 64), head_dim not last
    lengths = torch.tensor([50, 0, 31, 0])[::2]
    check(library, query, packed[:, :, 0], packed[:, :, 1], lengths)


def test_lengths_are_clamped(library) -> None:
    query, keys, values = (
        torch.randn(3, 2, 2, 64),
        torch.randn(3, 9, 1, 64),
        torch.randn(3, 9, 1, 64),
    )
    got = run(library, query, keys, values, torch.tensor([-3, 100, 2**40]))
    with aigc_fast.backend("reference"):
        want = ops.decode_attention(query, keys, values, torch.tensor([0, 9, 9]), return_lse=True)
    torch.testing.assert_close(got, want)
