"""softmax(scale * Q K^T) V over a key/value cache.

Split-KV: a program takes one (sequence, key/value head, block of query rows, split of the keys) and
leaves a normalised result with its logarithm; a second kernel merges the splits. The rows are
the query heads of a group and their new tokens, so that keys and values are read once for all of
them; they fill up a tile of at least 16, what tensor cores take. The host never looks at the
lengths: every sequence is cut into the same number of splits, each as long as its own length asks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .math import INTERPRETED, fp32, tanh
from .narrow import NARROW, widen
from .optional import contiguous

#: registers a thread and bytes of shared memory that a kernel may take; spills are never allowed
BUDGET = {"_attend": (255, 81952), "_merge": (64, 1024)}

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _keys_of_split(
    visible, is_row, length, split, splits, window, fixed_split, MASKED: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """(first, end) of this split of what the rows see: from the window of the first of them to the
    token of the last one."""
    low = 0 if window is None else tl.maximum(tl.min(visible, 0) - window, 0)
    high = length if MASKED else tl.max(tl.where(is_row, visible, 0), 0)
    size = fixed_split
    if fixed_split is None:
        size = tl.cdiv(tl.cdiv(high - low, splits), KEYS) * KEYS
    first = low + split * size
    return first, tl.minimum(first + size, high)


@triton.jit
def _offsets(
    keys, is_key, table_ptr, table_page, num_pages, key_batch, key_seq, value_batch, value_seq,
    PAGE: tl.constexpr,
):  # fmt: skip
    """Where keys and values lie in the cache of a sequence, or in the pages of its table."""
    if table_ptr is None:
        return keys.to(tl.int64) * key_seq, keys.to(tl.int64) * value_seq
    else:
        page = tl.load(table_ptr + keys // PAGE * table_page, is_key, 0)
        page = tl.minimum(tl.maximum(page, 0), num_pages - 1).to(tl.int64)
        row = (keys % PAGE).to(tl.int64)
        return page * key_batch + row * key_seq, page * value_batch + row * value_seq


@triton.jit
def _score(query, key, distance, factor, softcap, slopes):
    """Scores as exponents of two; distance: of a key from the token of a row."""
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * factor
    if softcap is not None:
        scores = tanh(scores) * (fp32(softcap) * _LOG2_E)
    if slopes is not None:
        scores += slopes[:, None] * distance.to(tl.float32)
    return scores


@triton.jit
def _is_seen(keys, is_key, visible, window, older, position, is_row, mask_ptr, q_len):
    """Which keys a row sees: all up to its token, or, of the new ones, those that a mask gives."""
    if mask_ptr is None:
        seen = (keys[None, :] < visible[:, None]) & is_key[None, :]
    else:
        column = (keys - older)[None, :]
        is_new = (column >= 0) & is_key[None, :] & is_row[:, None]
        allowed = tl.load(mask_ptr + position[:, None] * q_len + column, is_new, 1)
        seen = (allowed != 0) & is_key[None, :]
    if window is not None:
        seen = seen & (keys[None, :] >= (visible - window)[:, None])
    return seen


@triton.jit
def _attend(
    query_ptr, key_ptr, value_ptr, lengths_ptr, table_ptr, slopes_ptr, key_scale_ptr,
    value_scale_ptr, mask_ptr, out_ptr, lse_ptr,
    query_batch, query_seq, query_head, key_batch, key_seq, key_head,
    value_batch, value_seq, value_head, lengths_stride,
    table_batch, table_page, num_pages, mask_batch,
    q_len, heads, kv_heads, group, head_dim, capacity, row_blocks, splits, scale, window, softcap,
    fixed_split, PAGE: tl.constexpr, CACHE: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, DIM: tl.constexpr, IN_FP32: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0) % splits
    block = tl.program_id(0) // splits % row_blocks
    head = tl.program_id(0) // splits // row_blocks % kv_heads
    b = (tl.program_id(0) // splits // row_blocks // kv_heads).to(tl.int64)
    rows = block * ROWS + tl.arange(0, ROWS)
    position, query_head_index = rows // group, head * group + rows % group
    is_row = position < q_len
    dims = tl.arange(0, DIM)
    is_dim = (dims < head_dim)[None, :]

    length = tl.load(lengths_ptr + b * lengths_stride)
    length = tl.minimum(tl.maximum(length, 0), capacity).to(tl.int32)
    older = length - q_len  # what all see, where there is a mask
    visible = older + position + 1
    begin, end = _keys_of_split(
        visible, is_row, length, split, splits, window, fixed_split, mask_ptr is not None, KEYS
    )

    query = tl.load(
        query_ptr + b * query_batch
        + (position.to(tl.int64) * query_seq + query_head_index.to(tl.int64) * query_head)[:, None]
        + dims[None, :],
        is_row[:, None] & is_dim, 0.0,
    )  # fmt: skip
    if IN_FP32:
        query = query.to(tl.float32)
    key_ptr += head.to(tl.int64) * key_head
    value_ptr += head.to(tl.int64) * value_head
    if table_ptr is None:
        key_ptr += b * key_batch
        value_ptr += b * value_batch
    else:
        table_ptr += b * table_batch
    if mask_ptr is not None:
        mask_ptr += b * mask_batch
    factor = fp32(scale) * _LOG2_E if softcap is None else fp32(scale) / fp32(softcap)
    if key_scale_ptr is not None:
        factor *= tl.load(key_scale_ptr + head).to(tl.float32)
    slopes = None
    if slopes_ptr is not None:
        slopes = tl.load(slopes_ptr + query_head_index, is_row, 0.0)
        slopes = slopes.to(tl.float32) * _LOG2_E

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, DIM], tl.float32)
    for start in range(begin, end, KEYS):
        keys = start + tl.arange(0, KEYS)
        is_key = keys < end
        mask = is_key[:, None] & is_dim
        key_at, value_at = _offsets(
            keys, is_key, table_ptr, table_page, num_pages, key_batch, key_seq, value_batch,
            value_seq, PAGE,
        )  # fmt: skip
        key = tl.load(key_ptr + key_at[:, None] + dims[None, :], mask, 0.0)
        value = tl.load(value_ptr + value_at[:, None] + dims[None, :], mask, 0.0)
        key, value = widen(key, CACHE).to(query.dtype), widen(value, CACHE).to(query.dtype)
        distance = keys[None, :] - (visible - 1)[:, None]
        scores = _score(query, key, distance, factor, softcap, slopes)
        seen = _is_seen(keys, is_key, visible, window, older, position, is_row, mask_ptr, q_len)
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        decay = tl.exp2(top - base)
        p = tl.exp2(scores - base[:, None])
        total = total * decay + tl.sum(p, 1)
        result = result * decay[:, None]
        result = tl.dot(p.to(value.dtype), value, result, input_precision="ieee")
        top = new_top

    total_or_one = tl.where(total == 0, 1.0, total)
    lse = tl.where(total == 0, float("-inf"), top * _LN_2 + tl.log(total_or_one))
    at = ((b * q_len + position) * heads + query_head_index) * splits + split
    tl.store(lse_ptr + at, lse, is_row)
    result = result / total_or_one[:, None]
    if value_scale_ptr is not None:
        result *= tl.load(value_scale_ptr + head).to(tl.float32)
    result = result.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at[:, None] * head_dim + dims[None, :], result, is_row[:, None] & is_dim)


@triton.jit
def _merge(
    parts_ptr, part_lse_ptr, sinks_ptr, out_ptr, lse_ptr, heads, head_dim, splits,
    SPLITS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    split, dims = tl.arange(0, SPLITS), tl.arange(0, DIM)
    part_lse = tl.load(part_lse_ptr + row * splits + split, split < splits, float("-inf"))
    top = tl.max(part_lse, 0)
    sink = float("-inf")
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + row % heads).to(tl.float32)
        top = tl.maximum(top, sink)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.exp(sink - base)
    result = tl.zeros([DIM], tl.float32)
    for i in range(splits):
        weight = tl.exp(tl.load(part_lse_ptr + row * splits + i) - base)
        part = tl.load(parts_ptr + (row * splits + i) * head_dim + dims, dims < head_dim, 0.0)
        total += weight
        result += part * weight
    total_or_one = tl.where(total == 0, 1.0, total)
    result = (result / total_or_one).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * head_dim + dims, result, dims < head_dim)
    tl.store(lse_ptr + row, tl.where(total == 0, float("-inf"), base + tl.log(total_or_one)))


# ---- launcher ---------------------------------------------------------------------------------


def _with_contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def _tile(query: Tensor, rows: int) -> tuple[dict[str, int], int]:
    """The largest tile that fits the registers, and its warps."""
    head_dim = query.shape[-1]
    DIM = max(triton.next_power_of_2(head_dim), 16)
    wide = query.dtype == torch.float32  # fp32 products take no tensor cores
    # Odd head_dims are loaded element by element, with an address for each in registers.
    narrow = DIM <= 128 and head_dim % 16 == 0
    ROWS = min(max(triton.next_power_of_2(rows), 16), 16 if wide else 64 if narrow else 32)
    # Fewer keys where head_dim is 16: the addresses of 64 in pages do not fit the registers.
    KEYS = 16 if wide else min(max(8192 // DIM, 16), 64, 2 * DIM)
    return {"ROWS": ROWS, "KEYS": KEYS, "DIM": DIM}, 4 if narrow else 8


def decode_attention(query, key_cache, value_cache, cache_lengths, scale) -> tuple[Tensor, Tensor]:
    return decode_attention_full(
        query, key_cache, value_cache, cache_lengths, scale, None, None, None, None, None, None,
        None, None, None,
    )  # fmt: skip


def decode_attention_full(
    query, key_cache, value_cache, cache_lengths, scale, window, softcap, block_table, sinks,
    alibi_slopes, key_scale, value_scale, fixed_split, mask,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, q_len, heads, head_dim = query.shape
    capacity, kv_heads = key_cache.shape[1:3]
    page_size = 0
    if block_table is not None:
        page_size = capacity
        capacity = block_table.shape[1] * page_size
    if window is not None and window >= capacity:
        window = None
    span = capacity if window is None else min(capacity, window + q_len - 1)
    out = query.new_empty(query.shape)
    lse = query.new_empty((batch, q_len, heads), dtype=torch.float32)
    if not lse.numel():
        return out, lse
    mask_batch = 0
    if mask is not None:
        mask_batch = q_len * q_len if mask.dim() == 3 else 0
        mask = mask.contiguous().view(torch.int8)
    sinks, alibi_slopes, key_scale, value_scale = contiguous(
        sinks, alibi_slopes, key_scale, value_scale
    )
    kind = NARROW.get(key_cache.dtype)
    if kind:
        key_cache, value_cache = key_cache.view(torch.int8), value_cache.view(torch.int8)
    query, key_cache, value_cache = map(_with_contiguous_rows, (query, key_cache, value_cache))
    rows = heads // kv_heads * q_len
    tile, num_warps = _tile(query, rows)
    row_blocks = triton.cdiv(rows, tile["ROWS"])
    programs = batch * kv_heads * row_blocks
    splits = 2 * _processors(query.device) // programs  # in one round
    splits = max(min(splits, triton.cdiv(span, 2 * tile["KEYS"]), 64), 1)
    if fixed_split is not None:
        splits = max(triton.cdiv(span, fixed_split), 1)
    direct = splits == 1 and sinks is None
    if direct:
        parts, part_lse = out, lse
    else:
        parts = query.new_empty((*lse.shape, splits, head_dim), dtype=torch.float32)
        part_lse = parts.new_empty((*lse.shape, splits))
    _attend[(programs * splits,)](
        query, key_cache, value_cache, cache_lengths, block_table, alibi_slopes, key_scale,
        value_scale, mask, parts, part_lse,
        *query.stride()[:3], *key_cache.stride()[:3], *value_cache.stride()[:3],
        cache_lengths.stride(0), *(block_table.stride() if page_size else (0, 0)),
        key_cache.shape[0], mask_batch, q_len, heads, kv_heads, heads // kv_heads, head_dim,
        capacity, row_blocks, splits, head_dim**-0.5 if scale is None else float(scale), window,
        softcap, fixed_split, PAGE=page_size, CACHE=kind, **tile, IN_FP32=INTERPRETED,
        num_warps=num_warps, num_stages=2,
    )  # fmt: skip
    if not direct:
        _merge[(lse.numel(),)](
            parts, part_lse, sinks, out, lse, heads, head_dim, splits,
            SPLITS=triton.next_power_of_2(splits), DIM=tile["DIM"],
            num_warps=1 if tile["DIM"] <= 128 else 2,
        )  # fmt: skip
    return out, lse
