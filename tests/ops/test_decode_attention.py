"""What the table of samples cannot say of decode_attention."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import aigc_fast
from aigc_fast import ops
from tests.ops.test_every_op import IMPLEMENTATIONS, LOW, assert_as_good_as_torch

EVERYWHERE = pytest.mark.parametrize(
    ("implementation", "device"), [("reference", "cpu"), *IMPLEMENTATIONS]
)


def inputs(
    batch: int, q_len: int, heads: int, kv_heads: int, head_dim: int, capacity: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        torch.randn(batch, q_len, heads, head_dim).to(dtype),
        torch.randn(batch, capacity, kv_heads, head_dim).to(dtype),
        torch.randn(batch, capacity, kv_heads, head_dim).to(dtype),
    )


def run(implementation: str, device: str, *args: Tensor, **kwargs) -> tuple[Tensor, Tensor]:
    args = tuple(x.to(device) for x in args)
    chosen = aigc_fast.explain(ops.decode_attention, *args, **kwargs).implementation
    if implementation == "cuda" and chosen != "cuda":
        pytest.skip("the CUDA C++ kernel does not support this call")
    with aigc_fast.backend(implementation):
        out, lse = ops.decode_attention(*args, return_lse=True, **kwargs)
    return out.cpu(), lse.cpu()


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
@EVERYWHERE
def test_what_lies_beyond_a_length_is_never_used(implementation, device, garbage, dtype) -> None:
    query, keys, values = inputs(3, 2, 4, 2, 48, 37, dtype)
    lengths = torch.tensor([37, 18, 0])
    clean = run(implementation, device, query, keys, values, lengths)
    beyond = (torch.arange(37) >= lengths[:, None])[..., None, None]
    keys, values = keys.masked_fill(beyond, garbage), values.masked_fill(beyond, -garbage)
    dirty = run(implementation, device, query, keys, values, lengths)
    torch.testing.assert_close(dirty, clean, rtol=0, atol=0)


@EVERYWHERE
def test_nan_in_use_stays_nan(implementation, device) -> None:
    query, keys, values = inputs(2, 1, 2, 1, 16, 70)
    keys[0, 69, 0, 3] = torch.nan
    out, lse = run(implementation, device, query, keys, values, torch.tensor([70, 70]))
    assert out[0].isnan().all() and lse[0].isnan().all()
    assert out[1].isfinite().all() and lse[1].isfinite().all()


@EVERYWHERE
def test_a_query_that_sees_nothing(implementation, device) -> None:
    query, keys, values = inputs(2, 4, 4, 2, 16, 8)
    out, lse = run(implementation, device, query, keys, values, torch.tensor([2, 0]))
    nothing = torch.tensor([[True, True, False, False], [True] * 4])
    assert (out[nothing] == 0).all() and (lse[nothing] == -torch.inf).all()
    assert (out[~nothing] != 0).all() and lse[~nothing].isfinite().all()


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("q_len", [1, 6])
@EVERYWHERE
def test_agrees_with_torch(implementation, device, q_len, dtype) -> None:
    query, keys, values = inputs(2, q_len, 6, 2, 64, 50, dtype)
    length = 43
    lengths = torch.full((2,), length, dtype=torch.int32)
    mask = torch.ones(q_len, length, dtype=torch.bool).tril(length - q_len)

    def torch_s(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        q, k, v = (x.transpose(1, 2) for x in (q, k[:, :length], v[:, :length]))
        return [F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2)]

    out, _ = run(implementation, device, query, keys, values, lengths)
    exact = torch_s(query.double(), keys.double(), values.double())
    assert_as_good_as_torch([out], torch_s(query, keys, values), exact, dtype)


@EVERYWHERE
def test_parts_of_a_cache_merge_by_their_logarithms(implementation, device) -> None:
    query, keys, values = inputs(2, 1, 4, 2, 32, 60)
    lengths = torch.tensor([60, 41])
    whole, whole_lse = run(implementation, device, query, keys, values, lengths)
    first, first_lse = run(
        implementation, device, query, keys[:, :25], values[:, :25], torch.tensor([25, 25])
    )
    second, second_lse = run(
        implementation, device, query, keys[:, 25:], values[:, 25:], lengths - 25
    )
    lse = torch.logaddexp(first_lse, second_lse)
    merged = (
        first * (first_lse - lse).exp()[..., None] + second * (second_lse - lse).exp()[..., None]
    )
    torch.testing.assert_close(merged, whole)
    torch.testing.assert_close(lse, whole_lse)


@EVERYWHERE
def test_causal_rows_are_single_steps(implementation, device) -> None:
    """q_len tokens at once give what they give one after another."""
    query, keys, values = inputs(2, 5, 2, 1, 16, 20)
    lengths = torch.tensor([20, 9])
    out, lse = run(implementation, device, query, keys, values, lengths)
    for i in range(5):
        one, one_lse = run(
            implementation, device, query[:, i : i + 1], keys, values, lengths - 4 + i
        )
        torch.testing.assert_close(out[:, i : i + 1], one)
        torch.testing.assert_close(lse[:, i : i + 1], one_lse)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(
    ("batch", "q_len", "heads", "kv_heads", "head_dim", "lengths"),
    [
        (2, 1, 8, 2, 128, [3000, 257]),
        (1, 1, 8, 1, 64, [4097]),
        (2, 1, 3, 3, 96, [511, 513]),
        (1, 300, 4, 2, 64, [900]),
        (1, 33, 4, 1, 256, [300]),
    ],
)
def test_long_caches(batch, q_len, heads, kv_heads, head_dim, lengths, dtype) -> None:
    """Many blocks, splits and chunks of rows, with a peaked softmax."""
    args = (
        *inputs(batch, q_len, heads, kv_heads, head_dim, max(lengths), dtype),
        torch.tensor(lengths),
    )
    wide = [x.double() if x.is_floating_point() else x for x in args]
    exact = run("reference", "cpu", *wide, scale=0.5)
    plain = run("reference", "cpu", *args, scale=0.5)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for implementation in ["cpu"] if device == "cpu" else ["triton"]:
        ours = run(implementation, device, *args, scale=0.5)
        assert_as_good_as_torch(list(ours), list(plain), list(exact), dtype)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
@pytest.mark.parametrize("bad", [-1, 7, 2**31 - 1])
@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_refuses_lengths_outside_the_cache(implementation, bad, kind) -> None:
    args = *inputs(2, 1, 2, 1, 8, 6), torch.tensor([6, bad], dtype=kind)
    message = rf"cache_lengths must be in \[0, 6\], got {bad} for sequence 1"
    with aigc_fast.backend(implementation), pytest.raises(ValueError, match=message):
        ops.decode_attention(*args)
    with pytest.raises(ValueError, match=message):
        ops.decode_attention(*args)


def test_gpu_kernels_clamp_lengths() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args = inputs(2, 1, 2, 1, 8, 6)
    got = run("triton", device, *args, torch.tensor([-4, 1000]))
    torch.testing.assert_close(got, run("reference", "cpu", *args, torch.tensor([0, 6])))


@EVERYWHERE
def test_reads_views_in_place(implementation, device) -> None:
    """Keys and values as halves of one tensor, heads before positions, a slice of queries."""
    packed = torch.randn(2, 3, 2, 40, 32)  # (batch, kv_heads, key or value, capacity, head_dim)
    keys, values = packed.transpose(1, 3).unbind(2)
    query = torch.randn(2, 2, 9, 32)[:, :, :6]
    lengths = torch.tensor([40, 31])
    got = run(implementation, device, query, keys, values, lengths)
    want = run(
        "reference", "cpu", query.contiguous(), keys.contiguous(), values.contiguous(), lengths
    )
    torch.testing.assert_close(got, want)
    shared = keys[:1].expand(2, -1, -1, -1)
    got = run(implementation, device, query, shared, shared, lengths)
    torch.testing.assert_close(got, run("reference", "cpu", query, shared, shared, lengths))
