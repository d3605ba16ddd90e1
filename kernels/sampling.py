"""The next token of each row of logits; one program takes a row.

Logits become 32-bit keys in the same order, in scratch memory. A radix selection (four histograms
of 8 bits) finds the k-th largest; what survives is compacted, in the order of token numbers; a
binary search over the 32 bits of the key, each step a pass over the survivors, finds the edge of
the nucleus. Passes over the row: 3 for a plain draw, 7 with top-k, 36 with top-p alone.
"""

import ctypes

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gumbel import ONE, gumbel, log, log1p, weight
from .math import fp32
from .memory_order import contiguous_like
from .selection import (
    compact,
    first_of,
    keep_first,
    key_of,
    kth_largest,
    logit_of,
    nucleus,
    typical,
)

#: registers a thread and bytes of shared memory that a kernel may take; spills are never allowed
BUDGET = {"_sample": (128, 16384)}

_BLOCK = 2048


@triton.jit
def _setting(rows_ptr, value, row, i: tl.constexpr):
    if rows_ptr is None:
        return fp32(value)
    else:
        return tl.load(rows_ptr + row * 10 + i)


@triton.jit
def _processed(
    x, counts_ptr, allowed_ptr, token, mask, repetition, unrepetition, presence, frequency,
    PACKED: tl.constexpr,
):  # fmt: skip
    """x after penalties and mask."""
    if counts_ptr is not None:
        count = tl.load(counts_ptr + token, mask, 0)
        x = tl.where(count != 0, x * tl.where(x > 0, unrepetition, repetition), x)
        x = tl.where(count > 0, (x - count.to(tl.float32) * frequency) - presence, x)
    if allowed_ptr is not None:
        if PACKED:
            ok = (tl.load(allowed_ptr + token // 32, mask, 0) >> (token % 32)) & 1
        else:
            ok = tl.load(allowed_ptr + token, mask, 0).to(tl.int32)
        x = tl.where(ok != 0, x, float("-inf"))
    return x


@triton.jit
def _make_keys(
    logits_ptr, counts_ptr, allowed_ptr, key_ptr, vocab, repetition, unrepetition, presence,
    frequency, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(largest logit, largest after penalties and mask, whether a draw is possible); the keys of
    the latter are written."""
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    bad = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, vocab, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < vocab
        x = tl.load(logits_ptr + at, mask, float("-inf")).to(tl.float32) + 0.0
        bad |= 1 - (x < float("inf")).to(tl.int32)  # NaN is not below inf
        top = tl.maximum(top, x)
        x = _processed(
            x, counts_ptr, allowed_ptr, at, mask, repetition, unrepetition, presence, frequency,
            PACKED,
        ) + 0.0  # fmt: skip
        best = tl.maximum(best, x)
        tl.store(key_ptr + at, key_of(x).to(tl.int32, bitcast=True), mask)
    largest = tl.max(best, 0)
    good = (tl.max(bad, 0) == 0) & (largest > float("-inf")) & (largest < float("inf"))
    return tl.max(top, 0), largest, good


@triton.jit
def _log_sum(logits_ptr, vocab, top, BLOCK: tl.constexpr):
    """log(sum(exp(logits - top))); top is the largest."""
    total = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, vocab, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + at, at < vocab, float("-inf")).to(tl.float32)
        total += weight(x - top)
    return log1p((tl.sum(total, 0) - ONE).to(tl.float32) * 9.094947017729282e-13)  # 2^-40


@triton.jit
def _draw(
    key_ptr, token_ptr, size, edge, enough, each, least, mean, furthest, largest, rate, seed, step,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The token of the largest log-probability plus Gumbel noise, among those that pass all
    filters."""
    score = float("-inf")
    token = 0
    seen = 0
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        key = tl.load(key_ptr + at, at < size, 0).to(tl.uint32, bitcast=True)
        number = tl.load(token_ptr + at, at < size, 0)
        kept, seen = first_of(key, at < size, edge, enough, each, seen)
        y = (logit_of(key) - largest) * rate
        s = tl.where(
            kept & (y >= least) & (tl.abs(y - mean) <= furthest),
            y + gumbel(seed, step, number),
            float("-inf"),
        )
        highest = tl.max(s, 0)
        # Numbers rise from block to block, so the first of equals stays.
        candidate = tl.min(tl.where(s == highest, number, 0x7FFFFFFF), 0)
        token = tl.where(highest > score, candidate, token)
        score = tl.maximum(score, highest)
    return token


@triton.jit
def _sample(
    logits_ptr, rows_ptr, counts_ptr, allowed_ptr, seeds_ptr, steps_ptr, key_ptr, token_ptr,
    tokens_ptr, logprobs_ptr, vocab, logits_stride, counts_stride, allowed_stride,
    temperature, top_k, top_p, min_p, typical_p, repetition, presence, frequency, rate,
    unrepetition, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    if counts_ptr is not None:
        counts_ptr += row * counts_stride
    if allowed_ptr is not None:
        allowed_ptr += row * allowed_stride
    key_ptr += row * vocab
    token_ptr += row * vocab
    temperature = _setting(rows_ptr, temperature, row, 0)
    top_k = _setting(rows_ptr, top_k, row, 1)
    top_p = _setting(rows_ptr, top_p, row, 2)
    min_p = _setting(rows_ptr, min_p, row, 3)
    typical_p = _setting(rows_ptr, typical_p, row, 4)
    repetition = _setting(rows_ptr, repetition, row, 5)
    presence = _setting(rows_ptr, presence, row, 6)
    frequency = _setting(rows_ptr, frequency, row, 7)
    # Divisions in here would be calls: correctly rounded ones are, and they spill registers.
    rate = _setting(rows_ptr, rate, row, 8)
    unrepetition = _setting(rows_ptr, unrepetition, row, 9)

    top, largest, good = _make_keys(
        logits_ptr, counts_ptr, allowed_ptr, key_ptr, vocab, repetition, unrepetition, presence,
        frequency, PACKED, BLOCK,
    )  # fmt: skip
    log_sum = _log_sum(logits_ptr, vocab, top, BLOCK)
    tl.debug_barrier()  # the keys are there for all threads

    least = tl.where(min_p > 0, log(tl.maximum(min_p, 1e-30)), float("-inf"))
    # A logit below exp(-28) of the largest has no weight; it is never in a nucleus or typical.
    floor = tl.where(tl.minimum(top_p, typical_p) < 1, -28.0, least)
    k = tl.minimum(tl.where(temperature > 0, top_k, 1.0), 4194304.0).to(tl.int32)
    edge = tl.full((), 0, tl.uint32)
    n = vocab + 0
    if (k > 0) & (k < vocab):
        edge, n = kth_largest(key_ptr, vocab, k, BLOCK)
    size = compact(key_ptr, token_ptr, vocab, edge, n, floor, largest, rate, BLOCK)

    edge = tl.full((), 0, tl.uint32)
    enough = tl.full((), 1, tl.int64)
    each = tl.full((), 0, tl.int64)
    if top_p < 1:
        edge, enough, each = nucleus(key_ptr, size, top_p, largest, rate, BLOCK)
    mean = tl.full((), 0.0, tl.float32)
    furthest = tl.full((), float("inf"), tl.float32)
    if typical_p < 1:
        size = keep_first(key_ptr, token_ptr, size, edge, enough, each, least, largest, rate, BLOCK)
        edge = tl.full((), 0, tl.uint32)  # all of these are of the nucleus
        mean, furthest = typical(key_ptr, size, typical_p, largest, rate, BLOCK)
    seed, step = tl.load(seeds_ptr + row), tl.load(steps_ptr + row)
    token = _draw(
        key_ptr, token_ptr, size, edge, enough, each, least, mean, furthest, largest, rate, seed,
        step, BLOCK,
    )  # fmt: skip
    own = tl.load(logits_ptr + token).to(tl.float32)
    tl.store(tokens_ptr + row, tl.where(good, token, -1).to(tl.int64))
    tl.store(logprobs_ptr + row, tl.where(good, (own - top) - log_sum, float("nan")))


# ---- launchers ------------------------------------------------------------------------------


def _inverse(value: float) -> float:
    """1 / value in fp32; float64 on the way does not change how it rounds."""
    return 1.0 / max(ctypes.c_float(value).value, ctypes.c_float(1e-30).value)


def _rows(x: Tensor | None) -> tuple[Tensor | None, int]:
    """x with contiguous rows, and their stride."""
    if x is None:
        return None, 0
    x = x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
    return x, x.stride(0)


def sample_tokens(
    logits: Tensor, settings: list[float], rows: Tensor | None, token_counts: Tensor | None,
    allowed: Tensor | None, seeds: Tensor, steps: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, vocab = logits.shape
    tokens = contiguous_like(seeds)
    logprobs = torch.empty_like(tokens, dtype=torch.float32)
    if batch:
        (x, x_stride), (counts, counts_stride), (mask, mask_stride) = map(
            _rows, (logits, token_counts, allowed)
        )
        if rows is None:
            settings = [*settings, _inverse(settings[0]), _inverse(settings[5])]
        else:
            settings = [0.0] * 10
            rows = torch.cat([rows, 1.0 / rows[:, [0, 5]].clamp(min=1e-30)], 1)
        scratch = torch.empty((2, batch, vocab), dtype=torch.int32, device=logits.device)
        block = min(_BLOCK, max(256, triton.next_power_of_2(vocab)))
        _sample[(batch,)](
            x, rows, counts, mask,
            seeds.contiguous(), steps.contiguous(), scratch[0], scratch[1], tokens, logprobs,
            vocab, x_stride, counts_stride, mask_stride, *settings,
            PACKED=mask is not None and mask.dtype == torch.int32,
            BLOCK=block, num_warps=block // 128, enable_fp_fusion=False, maxnreg=128,
        )  # fmt: skip
    return tokens, logprobs
