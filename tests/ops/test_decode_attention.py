"""What the table of samples cannot say of decode_attention."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import aigc_fast
from aigc_fast import ops
from aigc_fast.ops import _registry
from tests.op_samples.decode_attention import paged
from tests.ops.test_every_op import DEVICE, IMPLEMENTATIONS, LOW, assert_as_good_as_torch

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
@pytest.mark.parametrize("head_dim", [48, 64])
@EVERYWHERE
def test_what_lies_beyond_a_length_is_never_used(
    implementation, device, head_dim, garbage, dtype
) -> None:
    query, keys, values = inputs(3, 2, 4, 2, head_dim, 37, dtype)
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


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@EVERYWHERE
def test_a_value_that_is_not_finite_stays_in_its_place(
    implementation, device, value, dtype
) -> None:
    query, keys, values = inputs(2, 1, 4, 2, 160, 70, dtype)
    values[0, 3, 1, 7] = values[0, 69, 1, 150] = value
    out, lse = run(implementation, device, query, keys, values, torch.tensor([70, 70]))
    spoiled = torch.zeros(out.shape, dtype=torch.bool)
    spoiled[0, 0, 2:, [7, 150]] = True
    assert torch.equal(~out.isfinite(), spoiled)
    assert lse.isfinite().all()


# (q_len, heads, kv_heads, head_dim, length, page_size, window): several blocks of keys and the end
# of one, which a CPU with int8 tiles takes 64 at a time.
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 3, 1, 128, 322, None, None),
        (1, 6, 2, 64, 190, None, 77),
        (1, 10, 2, 64, 150, 16, None),
        (3, 8, 2, 192, 141, 7, None),
        (1, 2, 2, 80, 99, None, None),
        (1, 4, 2, 520, 45, None, None),
    ],
)
@EVERYWHERE
def test_blocks_of_int8_caches(implementation, device, shape, dtype) -> None:
    q_len, heads, kv_heads, head_dim, length, page_size, window = shape
    query, keys, values = inputs(1, q_len, heads, kv_heads, head_dim, length + 8)
    query = query.to(dtype)
    keys, values = (x.mul(40).clamp(-127, 127).to(torch.int8) for x in (keys, values))
    scales = {name: torch.rand(kv_heads).add(0.5).div(40) for name in ("key_scale", "value_scale")}
    options: dict = {"window": window, **scales}
    if page_size is not None:
        keys, values, options["block_table"] = paged(keys, values, [length], page_size)
    lengths = torch.tensor([length])
    exact = run("reference", "cpu", query.double(), keys, values, lengths, **options)
    plain = run("reference", "cpu", query, keys, values, lengths, **options)
    ours = run(implementation, device, query, keys, values, lengths, **options)
    assert_as_good_as_torch(list(ours), list(plain), list(exact), dtype)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("logit", [3.5, 5.0, 6.2, 11.0])
@EVERYWHERE
def test_small_weights_count_over_int8_caches(implementation, device, logit, dtype) -> None:
    """The first key, whose value is 0, has e^logit times the weight of another."""
    query, keys, values = inputs(1, 1, 4, 1, 64, 601)
    keys, values = (x.mul(40).clamp(-127, 127).to(torch.int8) for x in (keys, values))
    query[..., 0], keys[..., 0], keys[:, 0, :, 0], values[:, 0] = 60.0, 0, 127, 0
    check_int8_caches(implementation, device, query.to(dtype), keys, values, logit / (60 * 127))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("outlier", [10.0, 100.0, 1000.0])
@EVERYWHERE
def test_small_numbers_count_over_int8_caches(implementation, device, outlier, dtype) -> None:
    """A query has a number that is far above its others, which meets small keys."""
    query, keys, values = inputs(2, 1, 4, 1, 64, 70)
    keys, values = (x.mul(40).clamp(-127, 127).to(torch.int8) for x in (keys, values))
    query[..., 3] = outlier
    keys[..., 3] = (keys[..., 3] > 0).to(torch.int8)
    check_int8_caches(implementation, device, query.to(dtype), keys, values, 1 / 320)


def check_int8_caches(implementation, device, query, keys, values, scale) -> None:
    lengths = torch.tensor([keys.shape[1]] * len(keys))
    exact = run("reference", "cpu", query.double(), keys, values, lengths, scale=scale)
    plain = run("reference", "cpu", query, keys, values, lengths, scale=scale)
    ours = run(implementation, device, query, keys, values, lengths, scale=scale)
    assert_as_good_as_torch(list(ours), list(plain), list(exact), query.dtype)


@EVERYWHERE
def test_nan_in_a_query_stays_with_its_head_over_int8_caches(implementation, device) -> None:
    query, keys, values = inputs(1, 1, 4, 1, 64, 70)
    keys, values = (x.mul(40).clamp(-127, 127).to(torch.int8) for x in (keys, values))
    query[0, 0, 2, 5] = torch.nan
    for dtype in LOW:
        out, lse = run(implementation, device, query.to(dtype), keys, values, torch.tensor([70]))
        heads = torch.arange(4)
        assert out[0, 0, 2].isnan().all() and out[0, 0, heads != 2].isfinite().all()
        assert lse[0, 0].isnan().tolist() == [False, False, True, False]


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


@pytest.mark.gpu
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
    ours = run("cpu" if DEVICE == "cpu" else "triton", DEVICE, *args, scale=0.5)
    assert_as_good_as_torch(list(ours), list(plain), list(exact), dtype)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "window"),
    [(8, 8, 64, None), (6, 3, 48, 700), (32, 8, 96, None)],
)
def test_bits_of_a_sequence_are_its_own(
    heads, kv_heads, head_dim, window, page_size, dtype
) -> None:
    """Whether the CPU walks heads together or one by one depends on threads and on the batch."""
    lengths = torch.tensor([1100, 40, 0, 513])
    query, keys, values = inputs(4, 1, heads, kv_heads, head_dim, 1100, dtype)

    def attend(rows: slice) -> tuple[Tensor, Tensor]:
        caches, options = (keys[rows], values[rows]), {"window": window}
        if page_size:
            *caches, table = paged(*caches, lengths[rows].tolist(), page_size)
            options["block_table"] = table
        return run("cpu", "cpu", query[rows], *caches, lengths[rows], **options)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = attend(slice(None))
        torch.set_num_threads(16)
        many = attend(slice(None))
        alone = [attend(slice(b, b + 1)) for b in range(4)]
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(many, one, rtol=0, atol=0)
    alone = tuple(torch.cat(parts) for parts in zip(*alone, strict=True))
    torch.testing.assert_close(alone, one, rtol=0, atol=0)


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


@pytest.mark.gpu
def test_gpu_kernels_clamp_lengths() -> None:
    args = inputs(2, 1, 2, 1, 8, 6)
    got = run("triton", DEVICE, *args, torch.tensor([-4, 1000]))
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


@pytest.mark.parametrize("page_size", [1, 3, 16, 32])
@EVERYWHERE
def test_pages_give_the_bits_of_a_contiguous_cache(implementation, device, page_size) -> None:
    query, keys, values = inputs(2, 3, 4, 2, 32, 70)
    lengths = torch.tensor([70, 41])
    pages, value_pages, table = paged(keys, values, lengths.tolist(), page_size)
    got = run(
        implementation, device, query, pages, value_pages, lengths, block_table=table.to(device)
    )
    want = run(implementation, device, query, keys, values, lengths)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@EVERYWHERE
def test_sequences_share_pages(implementation, device) -> None:
    query, keys, values = inputs(2, 1, 4, 2, 16, 40)
    keys[1, :24], values[1, :24] = keys[0, :24], values[0, :24]
    # Pages of 8, the first three of them common, among views of a larger pool.
    pool = torch.full((2, 9, 8, 2, 20), torch.nan)
    table = torch.tensor([[3, 0, 8, 1, 7], [3, 0, 8, 5, 4]], dtype=torch.int32)
    for cache, store in zip((keys, values), pool, strict=True):
        store[table.long(), ..., :16] = cache.view(2, 5, 8, 2, 16)
    wide = torch.stack([table, table - 99], -1)[..., 0]  # a table with strides
    lengths = torch.tensor([40, 33])
    got = run(
        implementation, device, query, pool[0, ..., :16], pool[1, ..., :16], lengths,
        block_table=wide.to(device),
    )  # fmt: skip
    want = run(implementation, device, query, keys, values, lengths)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("bad", [-1, 10, 2**31 - 1])
@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_refuses_pages_outside_the_pool(implementation, bad) -> None:
    query, keys, values = inputs(2, 1, 2, 1, 8, 20)
    lengths = torch.tensor([20, 9])
    pages, value_pages, table = paged(keys, values, lengths.tolist(), 4)
    args = query, pages, value_pages, lengths
    table[1, 2] = bad  # holds entry 8, the only one in sight of the window
    message = rf"block_table must be in \[0, 10\) where keys are valid, got {bad} for page 2 of"
    for window in (None, 1):
        with aigc_fast.backend(implementation), pytest.raises(ValueError, match=message):
            ops.decode_attention(*args, block_table=table, window=window)
    table[1, 2], table[1, :2] = 0, bad
    with aigc_fast.backend(implementation):
        ops.decode_attention(*args, block_table=table, window=1)


@pytest.mark.gpu
def test_gpu_kernels_clamp_pages() -> None:
    query, keys, values = inputs(2, 1, 2, 1, 8, 20)
    lengths = torch.tensor([20, 9])
    pages, value_pages, table = paged(keys, values, lengths.tolist(), 4)
    table[0, 1], table[1, 2] = -7, 2**31 - 1
    got = run("triton", DEVICE, query, pages, value_pages, lengths, block_table=table.to(DEVICE))
    clamped = table.clamp(0, 9)
    want = run("reference", "cpu", query, pages, value_pages, lengths, block_table=clamped)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("window", [1, 5, 32, 69, 300])
@pytest.mark.parametrize("q_len", [1, 4])
@EVERYWHERE
def test_window_is_a_mask(implementation, device, q_len, window) -> None:
    query, keys, values = inputs(2, q_len, 4, 2, 64, 70)
    lengths = torch.tensor([70, 18])
    got, _ = run(implementation, device, query, keys, values, lengths, window=window)
    own = lengths[:, None] - q_len + torch.arange(q_len)
    entry = torch.arange(70)
    mask = (entry <= own[..., None]) & (entry > own[..., None] - window)
    query, keys, values = (x.transpose(1, 2) for x in (query, keys, values))
    want = F.scaled_dot_product_attention(query, keys, values, mask[:, None], enable_gqa=True)
    torch.testing.assert_close(got, want.transpose(1, 2))


@pytest.mark.parametrize("page_size", [None, 4])
@pytest.mark.parametrize("dtype", LOW, ids=str)
@EVERYWHERE
def test_what_lies_before_the_window_is_never_used(
    implementation, device, dtype, page_size
) -> None:
    query, keys, values = inputs(3, 3, 4, 2, 48, 90, dtype)
    lengths = torch.tensor([90, 18, 0])
    clean = run(implementation, device, query, keys, values, lengths, window=6)
    entry = torch.arange(90)
    # The oldest query sees 6 entries, the two after it one more each.
    outside = (entry >= lengths[:, None]) | (entry < lengths[:, None] - 8)
    keys, values = (x.masked_fill(outside[..., None, None], torch.nan) for x in (keys, values))
    options = {}
    if page_size:
        keys, values, table = paged(keys, values, lengths.tolist(), page_size)
        table[0, : (90 - 8) // page_size] = -1
        options["block_table"] = table.to(device)
    dirty = run(implementation, device, query, keys, values, lengths, window=6, **options)
    torch.testing.assert_close(dirty, clean, rtol=0, atol=0)


@EVERYWHERE
def test_sink_is_a_key_without_a_value(implementation, device) -> None:
    query, keys, values = inputs(2, 2, 4, 2, 16, 30)
    lengths = torch.tensor([30, 0])
    sinks = torch.tensor([0.5, 30.0, -torch.inf, -2.0])
    plain, plain_lse = run(implementation, device, query, keys, values, lengths)
    out, lse = run(implementation, device, query, keys, values, lengths, sinks=sinks.to(device))
    want_lse = torch.logaddexp(plain_lse, sinks)
    torch.testing.assert_close(lse, want_lse)
    share = (plain_lse - want_lse).exp().nan_to_num(0)
    torch.testing.assert_close(out, plain * share[..., None])


def operator(args: tuple, options: dict) -> _registry.Op:
    """The one that a call runs."""
    return _registry.OPS[aigc_fast.explain(lambda: ops.decode_attention(*args, **options)).op]


@pytest.mark.parametrize(
    "options",
    [
        {"window": 3},
        {"softcap": 2.0},
        {"sinks": torch.zeros(4)},
        {"alibi_slopes": torch.zeros(4)},
        {"block_table": torch.zeros(2, 1, dtype=torch.int32)},
        {"key_scale": torch.ones(2)},
        {"value_scale": torch.ones(2)},
        {"fixed_split": 64},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_are_not_for_the_cuda_kernel(options) -> None:
    """It takes plain calls alone; with an option another operator runs, which lacks it."""
    args = *inputs(2, 1, 4, 2, 16, 8), torch.tensor([8, 3])
    plain, full = operator(args, {}), operator(args, options)
    assert plain._cuda_supports is not None
    assert full._cuda_supports is None and full.has("triton") and not full.has("cuda")


@pytest.mark.parametrize("name", ["sinks", "alibi_slopes"])
def test_options_have_no_derivative(name) -> None:
    args = *inputs(1, 1, 2, 1, 8, 4), torch.tensor([4])
    option = {name: torch.zeros(2, requires_grad=True)}
    with pytest.raises(RuntimeError, match="has no derivative"):
        ops.decode_attention(*args, **option)
    with torch.no_grad():
        ops.decode_attention(*args, **option)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("cache", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@EVERYWHERE
def test_every_byte_of_a_narrow_cache(implementation, device, cache, dtype) -> None:
    """The 256 values as the one entry of each of 16 caches."""
    values = torch.arange(256, dtype=torch.uint8).view(cache).view(16, 1, 1, 16)
    query = torch.zeros(16, 1, 1, 16, dtype=dtype)
    scale = torch.tensor([0.25])
    keys = torch.zeros(16, 1, 1, 16).to(cache)
    lengths = torch.ones(16, dtype=torch.int32)
    out, _ = run(implementation, device, query, keys, values, lengths, value_scale=scale.to(device))
    want = (values.float() * 0.25).to(dtype)
    torch.testing.assert_close(out, want, rtol=0, atol=0, equal_nan=True)


@EVERYWHERE
def test_scales_are_factors_on_the_caches(implementation, device) -> None:
    query, keys, values = inputs(2, 2, 4, 2, 32, 40)
    keys, values = ((x * 30).round().clamp(-127, 127) for x in (keys, values))
    lengths = torch.tensor([40, 21])
    key_scale, value_scale = torch.tensor([0.03, 0.01]), torch.tensor([0.2, 2.0])
    want = run(
        implementation, device, query, keys * key_scale[:, None], values * value_scale[:, None],
        lengths,
    )  # fmt: skip
    scales = {"key_scale": key_scale.to(device), "value_scale": value_scale.to(device)}
    for dtype in (torch.int8, torch.float32):
        got = run(
            implementation, device, query, keys.to(dtype), values.to(dtype), lengths, **scales
        )
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize(("implementation", "device"), IMPLEMENTATIONS)
def test_fixed_split_does_not_depend_on_the_batch(implementation, device, page_size) -> None:
    """Bitwise: alone or among others, in a large cache or a small one."""
    query, keys, values = inputs(3, 2, 4, 2, 32, 130)
    lengths = torch.tensor([77, 130, 5])

    def split(q: Tensor, k: Tensor, v: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        options = {"fixed_split": 32}
        if page_size is not None:
            k, v, table = paged(k, v, n.tolist(), page_size)
            options["block_table"] = table.to(device)
        return run(implementation, device, q, k, v, n, **options)

    together = split(query, keys, values, lengths)
    for i, length in enumerate(lengths.tolist()):
        one = slice(i, i + 1)
        for capacity in (length, 130):
            alone = split(query[one], keys[one, :capacity], values[one, :capacity], lengths[one])
            for a, b in zip(alone, together, strict=True):
                torch.testing.assert_close(a, b[one], rtol=0, atol=0)


def test_cpu_calls_never_depend_on_the_batch() -> None:
    query, keys, values = inputs(3, 1, 6, 2, 64, 1500, torch.bfloat16)
    lengths = torch.tensor([700, 1500, 3])
    together = run("cpu", "cpu", query, keys, values, lengths)
    for i, length in enumerate(lengths.tolist()):
        one = slice(i, i + 1)
        alone = run("cpu", "cpu", query[one], keys[one, :length], values[one, :length],
                    lengths[one])  # fmt: skip
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a, b[one], rtol=0, atol=0)


@EVERYWHERE
def test_merged_parts_are_the_whole(implementation, device) -> None:
    """A prefix that all sequences share, and what each has of its own; one has nothing."""
    query, keys, values = inputs(3, 1, 4, 2, 32, 60)
    keys[:, :20], values[:, :20] = keys[:1, :20].clone(), values[:1, :20].clone()
    lengths, sinks = torch.tensor([60, 41, 20]), torch.randn(4)
    # The queries of all go to the prefix as one sequence: each element of it is read once.
    heads = query.view(1, 1, 3, 2, 2, 32).transpose(2, 3).reshape(1, 1, 12, 32)
    shared, shared_lse = run(
        implementation, device, heads, keys[:1, :20], values[:1, :20], torch.tensor([20])
    )
    shared = shared.view(2, 3, 2, 32).transpose(0, 1).reshape(3, 1, 4, 32)
    shared_lse = shared_lse.view(2, 3, 2).transpose(0, 1).reshape(3, 1, 4)
    own, own_lse = run(
        implementation, device, query, keys[:, 20:], values[:, 20:], lengths - 20,
        sinks=sinks.to(device),
    )  # fmt: skip
    got = ops.merge_attention([shared, own], [shared_lse, own_lse])
    want = run(implementation, device, query, keys, values, lengths, sinks=sinks.to(device))
    torch.testing.assert_close(got, want)
    low, _ = ops.merge_attention([shared.half(), own.half()], [shared_lse, own_lse])
    assert low.dtype == torch.float16


def test_merge_attention_of_nothing_and_refusals() -> None:
    nothing, no_lse = torch.zeros(2, 1, 3, 4), torch.full((2, 1, 3), -torch.inf)
    out, lse = ops.merge_attention([nothing] * 3, [no_lse] * 3)
    assert (out == 0).all() and (lse == -torch.inf).all()
    with pytest.raises(ValueError, match="at least 2, got 1 and 1"):
        ops.merge_attention([nothing], [no_lse])
    with pytest.raises(ValueError, match="at least 2, got 2 and 3"):
        ops.merge_attention([nothing] * 2, [no_lse] * 3)
    with pytest.raises(TypeError, match=r"outs\[1\] must have the dtype of outs\[0\]"):
        ops.merge_attention([nothing, nothing.half()], [no_lse] * 2)
    with pytest.raises(ValueError, match=r"lses\[1\] must have shape \(2, 1, 3\)"):
        ops.merge_attention([nothing] * 2, [no_lse, no_lse[:1]])
    with pytest.raises(TypeError, match=r"lses\[0\] must be float32, float64"):
        ops.merge_attention([nothing] * 2, [no_lse.half()] * 2)


@EVERYWHERE
def test_a_causal_mask_changes_nothing(implementation, device) -> None:
    query, keys, values = inputs(2, 5, 4, 2, 32, 40)
    lengths, causal = torch.tensor([40, 3]), torch.ones(5, 5, dtype=torch.bool).tril()
    masked = run(implementation, device, query, keys, values, lengths, mask=causal.to(device))
    plain = run(implementation, device, query, keys, values, lengths)
    torch.testing.assert_close(masked, plain)


@EVERYWHERE
def test_branches_of_a_tree_are_sequences_of_their_own(implementation, device) -> None:
    """Three drafts behind one prefix, 0-1, 0-2-3: each token gets what it gets in its own draft."""
    query, keys, values = inputs(1, 4, 2, 1, 16, 24)
    tree = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], dtype=torch.bool)
    length = torch.tensor([24])
    out, lse = run(implementation, device, query, keys, values, length, mask=tree.to(device))
    for draft in ([0, 1], [0, 2, 3]):
        entries = [*range(20), *(20 + i for i in draft)]
        alone, alone_lse = run(
            implementation, device, query[:, draft], keys[:, entries], values[:, entries],
            torch.tensor([len(entries)]),
        )  # fmt: skip
        torch.testing.assert_close(out[:, draft], alone)
        torch.testing.assert_close(lse[:, draft], alone_lse)
