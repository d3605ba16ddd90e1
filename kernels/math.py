"""Functions that Triton lacks or gives only through libdevice, which its interpreter cannot run.

All take and return fp32. Coefficients: Cephes (S. Moshier), the same as in csrc's vec.h.
"""

import os

import triton
import triton.language as tl

#: The interpreter's bf16 products are wrong, and it cuts off where bf16 should round: there the
#: operands of tl.dot become fp32.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def fp32(x):
    """A scalar argument as fp32: Inductor passes Python floats as fp64, at half the speed."""
    return tl.cast(x, tl.float32)


@triton.jit
def tanh(x):
    a = tl.abs(x)
    e = tl.exp(-2.0 * a)
    far = (1.0 - e) / (1.0 + e)
    far = tl.where(x < 0, -far, far)
    # Below 0.625 the difference 1 - e cancels.
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    return tl.where(a < 0.625, p * z * x + x, far)


@triton.jit
def exp_tail(x):
    """e^x - 1 - x for |x| < 0.34, where the difference cancels."""
    p = 1.9875691500e-4 * x + 1.3981999507e-3
    p = p * x + 8.3334519073e-3
    p = p * x + 4.1665795894e-2
    p = p * x + 1.6666665459e-1
    p = p * x + 5.0000001201e-1
    return p * x * x


@triton.jit
def expm1(x):
    return tl.where(tl.abs(x) < 0.34, exp_tail(x) + x, tl.exp(x) - 1.0)


@triton.jit
def softplus(x):
    # log(1 + e) for e in (0, 1]; what 1 + e rounds away is added back.
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + tl.log(u) + (e - (u - 1.0)) / u


@triton.jit
def normal(x):
    """Density and cumulative distribution of the standard normal; error bounds in
    smooth_activation.h."""
    z = x * x
    e = tl.exp(-0.5 * z)
    t = 1.0 / (1.0 + 0.3 * tl.abs(x))
    p = -2.0623469305e-2 * t + 1.1243561439e-1
    p = p * t - 2.2821360255e-1
    p = p * t + 1.9178453797e-1
    p = p * t - 7.9423493785e-2
    p = p * t + 9.6156833974e-2
    p = p * t + 7.8389648925e-2
    p = p * t + 1.1023542488e-1
    p = p * t + 1.1957181386e-1
    p = p * t + 1.1968668982e-1
    tail = e * (t * p)
    q = -7.6542086683e-6 * z + 1.1348637271e-4
    q = q * z - 1.1863299425e-3
    q = q * z + 9.9733234101e-3
    q = q * z - 6.6490359924e-2
    q = q * z + 3.9894228012e-1
    far = tl.where(x < 0, tail, 1.0 - tail)
    return e * 0.3989422804014327, tl.where(z < 1, 0.5 + q * x, far)


@triton.jit
def sines(u):
    """sin(u)^2, sin(2u) and cos(2u) for u of any size; tl.sin keeps a table in local memory."""
    # u = n pi/2 + r, |r| <= pi/4. The parts of pi/2 have 8, 11 and 24 bits: up to n = 8192 their
    # products with n are exact.
    n = tl.floor(u * 0.636619772367581343 + 0.5)
    r = u - n * 1.5703125
    r = r - n * 4.837512969970703125e-4
    r = r - n * 7.54978995489188216e-8
    half = n * 0.5
    odd = half != tl.floor(half)
    if tl.max(tl.abs(u)) > 12800.0:
        # In fp64, which most programs never reach. Beyond 1e8, where neighbours in fp32 lie
        # periods apart, r is only kept within its bounds.
        wide = u.to(tl.float64)
        m = tl.floor(wide * 0.636619772367581343 + 0.5)
        rest = (wide - m * 1.57079632679489661923).to(tl.float32)
        far = tl.abs(u) > 12800.0
        r = tl.where(far, tl.where(rest > 0.8, 0.8, tl.where(rest < -0.8, -0.8, rest)), r)
        half_m = m * 0.5
        odd = tl.where(far, half_m != tl.floor(half_m), odd)
    # sin^2(r) and sin(2r) by minimax polynomials of their own: products of sin(r) and cos(r) would
    # round twice more.
    z = r * r
    p = 1.3474253938e-4 * z - 3.1712938404e-3
    p = p * z + 4.4443759425e-2
    p = p * z - 3.3333328889e-1
    square = p * z * z + z
    t = r + r
    zt = t * t
    q = 2.6057505956e-6 * zt - 1.9809590059e-4
    q = q * zt + 8.3330660822e-3
    q = q * zt - 1.6666659545e-1
    # 1 - square is at least 1/2: nothing cancels.
    turn = tl.where(odd, -1.0, 1.0)
    return (
        tl.where(odd, 1.0 - square, square),
        turn * (q * zt * t + t),
        turn * (1.0 - 2.0 * square),
    )
