"""Counter-based Gumbel noise, and exp and log, that come out the same to the last bit everywhere.

Every step is one fp32 operation that IEEE 754 rounds correctly, or one on integers. The C++
(csrc/include/aigc_fast/gumbel.h) and Triton (kernels/gumbel.py) twins take the same steps, without
fused multiply-adds: so all implementations draw the same tokens. Polynomials: Cephes (S. Moshier).
"""

import torch
from torch import Tensor

#: weight of the likeliest token; the weights of 2^22 tokens still add up in int64
ONE = 1 << 40
_LOG_TAIL = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
    -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
_EXP_TAIL = (
    1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1,
    5.0000001201e-1,
)  # fmt: skip


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    p = torch.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        p = p * x + c
    return p


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """(k, m) with x = 2^k * m, m from sqrt(1/2) to sqrt(2)."""
    bits = x.view(torch.int32)
    k = (bits - 0x3F3504F3) >> 23
    return k, (bits - (k << 23)).view(torch.float32)


def _log(k: Tensor, f: Tensor) -> Tensor:
    """log(2^k * (1 + f))"""
    z, n = f * f, k.float()
    tail = f * z * _polynomial(f, _LOG_TAIL) - z * 0.5
    return (f + (tail + n * -2.12194440e-4)) + n * 0.693359375


def log(x: Tensor) -> Tensor:
    """log(x) of a normal positive fp32 number."""
    k, m = _split(x)
    return _log(k, m - 1.0)


def log1p(s: Tensor) -> Tensor:
    """log(1 + s) of fp32 s > -1, precise near 0."""
    k, m = _split(s + 1.0)
    return _log(k, torch.where(k == 0, s, m - 1.0))


def weight(y: Tensor) -> Tensor:
    """exp(y) of fp32 y <= 0 as an integer, in units of 1 / ONE, rounded towards zero."""
    y = y.clamp(min=-30.0)
    shifted = y * 1.44269504089 + 12582912.0
    n = shifted - 12582912.0
    r = y - n * 0.693359375
    r = r + n * 2.12194440e-4
    e = _polynomial(r, _EXP_TAIL) * r * r
    e = e + r + 1.0
    scale = ((n.int() + (40 + 127)) << 23).view(torch.float32)
    return (e * scale).long()


def moment(weights: Tensor, y: Tensor) -> Tensor:
    """weights * y as integers, rounded towards zero; y is 0 or less. A weight has 24 bits, so that
    its float is exact, and weights of 2^22 tokens times y still add up in int64."""
    return (weights.float() * y.clamp(min=-30.0)).long()


def reciprocal(x: Tensor) -> Tensor:
    """1 / x of fp32 x > 0, nearly: Newton's steps, which take no division."""
    r = (0x7EF311C7 - x.view(torch.int32)).view(torch.float32)
    for _ in range(4):
        r = r * (2.0 - x * r)
    return r


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al. 2011) of four counter words and two key words; all words are
    int64 tensors of values below 2^32."""
    mask = 0xFFFFFFFF
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32) & mask ^ c1 ^ k0, b & mask, (a >> 32) & mask ^ c3 ^ k1, a & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3


def gumbel(seeds: Tensor, steps: Tensor, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise, fp32, for int64 token numbers; seeds and steps broadcast to them.

    64 tokens share 16 counters: token t takes word t // 16 % 4 of counter
    (t // 64 * 16 + t % 16, step, step >> 32, 0) under the key (seed, seed >> 32).
    """
    mask = 0xFFFFFFFF
    counter = (tokens >> 6) << 4 | tokens & 15
    words = philox(
        (counter, steps & mask, (steps >> 32) & mask, torch.zeros_like(steps)),
        (seeds & mask, (seeds >> 32) & mask),
    )
    word = torch.stack(torch.broadcast_tensors(*words)).gather(0, (tokens >> 4 & 3)[None])[0]
    # 31 bits as a number v in (0, 1); -log(1 - v) is precise where it is small, which decides.
    v = ((word >> 1).float() + 0.5) * 2.0**-31
    v = v.clamp(max=1 - 2.0**-24)
    return -log(-log1p(-v))
