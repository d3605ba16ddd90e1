"""Which logits are the k largest, and which carry a probability mass, without sorting.

Logits are 32-bit keys in the same order. Each function is one program's loop over one row of them.
"""

import triton
import triton.language as tl

from .gumbel import reciprocal, weight


@triton.jit
def key_of(x):
    """uint32 in the order of x."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits ^ (bits >> 31 & 0x7FFFFFFF)) ^ -0x80000000).to(tl.uint32, bitcast=True)


@triton.jit
def logit_of(key):
    bits = key.to(tl.int32, bitcast=True) ^ -0x80000000
    return (bits ^ (bits >> 31 & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def kth_largest(key_ptr, size, k, BLOCK: tl.constexpr):
    """(key, n): the n first tokens of that key, and all of larger keys, are the k largest."""
    found = tl.full((), 0, tl.uint32)
    digits = tl.arange(0, 256)
    for level in range(4):
        shift = tl.cast(24 - 8 * level, tl.uint32)
        counts = tl.zeros((256,), tl.int32)
        for start in range(0, size, BLOCK):
            at = start + tl.arange(0, BLOCK)
            key = tl.load(key_ptr + at, at < size, 0).to(tl.uint32, bitcast=True)
            same = (at < size) & ((key >> shift >> 8) == (found >> shift >> 8))
            counts += tl.histogram((key >> shift & 255).to(tl.int32), 256, mask=same)
        digit = tl.sum((tl.cumsum(counts, 0, reverse=True) >= k).to(tl.int32), 0) - 1
        k -= tl.sum(tl.where(digits > digit, counts, 0), 0)
        found |= digit.to(tl.uint32) << shift
    return found, k


@triton.jit
def _mass(key_ptr, size, least, largest, rate, BLOCK: tl.constexpr):
    """Weight of the tokens with a key of at least `least`."""
    total = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        key = tl.load(key_ptr + at, at < size, 0).to(tl.uint32, bitcast=True)
        w = weight((logit_of(key) - largest) * rate)
        total += tl.where((at < size) & (key >= least), w, 0)
    return tl.sum(total, 0)


@triton.jit
def nucleus(key_ptr, size, top_p, largest, rate, BLOCK: tl.constexpr):
    """(key, mass, weight): all tokens of larger keys, and so many of that key and that weight that
    their sum reaches the mass, reach top_p."""
    found = tl.full((), 0, tl.uint32)
    total = _mass(key_ptr, size, found, largest, rate, BLOCK)
    reach = tl.maximum((total.to(tl.float32) * top_p).to(tl.int64), 1)
    for bit in range(32):
        tried = found | (tl.full((), 1, tl.uint32) << tl.cast(31 - bit, tl.uint32))
        enough = _mass(key_ptr, size, tried, largest, rate, BLOCK) >= reach
        found = tl.where(enough, tried, found)
    more = reach - _mass(key_ptr, size, found + 1, largest, rate, BLOCK)
    return found, more, weight((logit_of(found) - largest) * rate)


@triton.jit
def first_of(key, mask, edge, enough, each, seen):
    """(kept, seen): larger keys, and those of the key `edge` until `enough` of `each` is reached;
    `seen` of them are past."""
    equal = (mask & (key == edge)).to(tl.int32)
    before = seen + tl.cumsum(equal, 0) - equal
    kept = mask & ((key > edge) | ((equal != 0) & (before * each < enough)))
    return kept, seen + tl.sum(equal, 0)


@triton.jit
def compact(
    key_ptr, token_ptr, vocab, edge, n, floor, largest, rate, BLOCK: tl.constexpr
):  # fmt: skip
    """How many survive: the keys of the top k that are likely enough move to the front, and their
    token numbers beside them."""
    size = 0
    seen = 0
    for start in range(0, vocab, BLOCK):
        at = start + tl.arange(0, BLOCK)
        key = tl.load(key_ptr + at, at < vocab, 0).to(tl.uint32, bitcast=True)
        kept, seen = first_of(key, at < vocab, edge, n, 1, seen)
        x = logit_of(key)
        kept = kept & (x > float("-inf")) & ((x - largest) * rate >= floor)
        to = size + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.debug_barrier()  # survivors move forward within what all threads have read
        tl.store(key_ptr + to, key.to(tl.int32, bitcast=True), kept)
        tl.store(token_ptr + to, at, kept)
        size += tl.sum(kept.to(tl.int32), 0)
    tl.debug_barrier()
    return size


@triton.jit
def keep_first(
    key_ptr, token_ptr, size, edge, enough, each, least, largest, rate, BLOCK: tl.constexpr
):  # fmt: skip
    """How many remain: tokens of the nucleus that are likely enough move to the front."""
    left = 0
    seen = 0
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        key = tl.load(key_ptr + at, at < size, 0).to(tl.uint32, bitcast=True)
        number = tl.load(token_ptr + at, at < size, 0)
        kept, seen = first_of(key, at < size, edge, enough, each, seen)
        kept = kept & ((logit_of(key) - largest) * rate >= least)
        to = left + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.debug_barrier()  # tokens move within what all threads have read
        tl.store(key_ptr + to, key.to(tl.int32, bitcast=True), kept)
        tl.store(token_ptr + to, number, kept)
        left += tl.sum(kept.to(tl.int32), 0)
    tl.debug_barrier()
    return left


@triton.jit
def _near_mass(key_ptr, size, mean, furthest, largest, rate, BLOCK: tl.constexpr):
    """Weight of the tokens whose distance from the mean has at most the bits `furthest`."""
    total = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        key = tl.load(key_ptr + at, at < size, 0).to(tl.uint32, bitcast=True)
        y = (logit_of(key) - largest) * rate
        near = tl.abs(y - mean).to(tl.int32, bitcast=True) <= furthest
        total += tl.where((at < size) & near, weight(y), 0)
    return tl.sum(total, 0)


@triton.jit
def typical(key_ptr, size, typical_p, largest, rate, BLOCK: tl.constexpr):
    """(mean, distance): the tokens at most that far from the mean of log-probabilities are the
    nearest whose mass reaches typical_p."""
    weights = tl.zeros((BLOCK,), tl.int64)
    moments = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        key = tl.load(key_ptr + at, at < size, 0).to(tl.uint32, bitcast=True)
        y = (logit_of(key) - largest) * rate
        w = tl.where(at < size, weight(y), 0)
        weights += w
        moments += (w.to(tl.float32) * tl.maximum(y, -30.0)).to(tl.int64)
    total = tl.sum(weights, 0)
    mean = tl.sum(moments, 0).to(tl.float32) * reciprocal(total.to(tl.float32))
    reach = tl.minimum((total.to(tl.float32) * typical_p).to(tl.int64), total)
    reach = tl.maximum(reach, 1)
    # The largest bits of a distance below which there is too little.
    below = tl.full((), -1, tl.int32)
    for bit in range(31):
        tried = below + (tl.full((), 1, tl.int32) << (30 - bit))
        little = _near_mass(key_ptr, size, mean, tried, largest, rate, BLOCK) < reach
        below = tl.where(little, tried, below)
    return mean, (below + 1).to(tl.float32, bitcast=True)
