"""Counter-based Gumbel noise, and exp and log, that come out the same to the last bit as in
aigc_fast/ops/_gumbel.py, which defines them. Launch with enable_fp_fusion=False: a fused
multiply-add would round differently."""

import triton
import triton.language as tl

#: weight of the likeliest token
ONE = tl.constexpr(1 << 40)


@triton.jit
def _split(x):
    """(k, m) with x = 2^k * m, m from sqrt(1/2) to sqrt(2)."""
    bits = x.to(tl.int32, bitcast=True)
    k = (bits - 0x3F3504F3) >> 23
    return k, (bits - (k << 23)).to(tl.float32, bitcast=True)


@triton.jit
def _log(k, f):
    """log(2^k * (1 + f))"""
    z = f * f
    n = k.to(tl.float32)
    p = f * 7.0376836292e-2 - 1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f - 1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f - 1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    tail = f * z * p - z * 0.5
    return (f + (tail + n * -2.12194440e-4)) + n * 0.693359375


@triton.jit
def log(x):
    """log(x) of normal positive numbers."""
    k, m = _split(x)
    return _log(k, m - 1.0)


@triton.jit
def log1p(s):
    """log(1 + s) for s > -1, precise near 0."""
    k, m = _split(s + 1.0)
    return _log(k, tl.where(k == 0, s, m - 1.0))


@triton.jit
def weight(y):
    """exp(y) for y <= 0 as int64, in units of 1 / ONE, rounded towards zero."""
    y = tl.maximum(y, -30.0)
    shifted = y * 1.44269504089 + 12582912.0
    n = shifted - 12582912.0
    r = y - n * 0.693359375
    r = r + n * 2.12194440e-4
    e = r * 1.9875691500e-4 + 1.3981999507e-3
    e = e * r + 8.3334519073e-3
    e = e * r + 4.1665795894e-2
    e = e * r + 1.6666665459e-1
    e = e * r + 5.0000001201e-1
    e = e * r * r + r + 1.0
    scale = ((n.to(tl.int32) + 167) << 23).to(tl.float32, bitcast=True)
    return (e * scale).to(tl.int64)


@triton.jit
def reciprocal(x):
    """1 / x for x > 0, nearly: Newton's steps, which take no division."""
    r = (0x7EF311C7 - x.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    for _ in tl.static_range(4):
        r = r * (2.0 - x * r)
    return r


@triton.jit
def gumbel(seed, step, token):
    """Standard Gumbel noise of int32 token numbers for one int64 seed and step.

    64 tokens share 16 counters: token t takes word t // 16 % 4 of counter t // 64 * 16 + t % 16.
    """
    counter = (token >> 6 << 4) | (token & 15)
    zero = counter * 0
    low = (step & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
    high = (step >> 32).to(tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, counter, zero + low, zero + high, zero)
    which = token >> 4 & 3
    word = tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))
    v = ((word >> 1).to(tl.int32).to(tl.float32) + 0.5) * 4.656612873077393e-10  # 2^-31
    v = tl.minimum(v, 0.99999994039535522)  # 1 - 2^-24
    return -log(-log1p(-v))
