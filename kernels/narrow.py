"""Numbers of one byte, as caches hold them, from and to their bits: older GPUs and the interpreter
cannot convert fp8."""

import torch
import triton
import triton.language as tl

#: names of the dtypes of one byte, for constexpr arguments
NARROW = {torch.int8: "int8", torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}


@triton.jit
def widen(x, KIND: tl.constexpr):
    """fp8 from its bits as fp16; any other number as it is."""
    if KIND == "e5m2":
        x = (x.to(tl.int16) << 8).to(tl.float16, bitcast=True)
    if KIND == "e4m3":
        bits = (x.to(tl.int16) << 7) & -16512  # 0xbf80: the sign, and 2^-8 of the number
        bits = tl.where((bits & 0x3F80) == 0x3F80, 0x7FFF, bits).to(tl.int16)
        x = bits.to(tl.float16, bitcast=True) * 256.0
    return x


@triton.jit
def narrow(x, KIND: tl.constexpr):
    """fp32 to int8, or to the bits of fp8: nearest, to even; saturating; NaN to NaN or to 0."""
    if KIND == "int8":
        x = tl.where(x == x, tl.minimum(tl.maximum(x, -128.0), 127.0), 0.0)
        return ((x + 12582912.0) - 12582912.0).to(tl.int8)
    MANTISSA: tl.constexpr = 3 if KIND == "e4m3" else 2
    BIAS: tl.constexpr = 7 if KIND == "e4m3" else 15
    LARGEST: tl.constexpr = 448.0 if KIND == "e4m3" else 57344.0
    NORMAL: tl.constexpr = 2.0 ** (1 - BIAS)  # the smallest normal number
    MAGIC: tl.constexpr = NORMAL * 2.0 ** (23 - MANTISSA)  # its ulp is that of fp8
    MAGIC_BITS: tl.constexpr = (1 - BIAS + 23 - MANTISSA + 127) << 23
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    magnitude = tl.minimum(tl.abs(x), LARGEST)
    bits = magnitude.to(tl.int32, bitcast=True)
    odd = (bits >> (23 - MANTISSA)) & 1
    rounded = (bits + (1 << (22 - MANTISSA)) - 1 + odd) >> (23 - MANTISSA)
    small = (magnitude + MAGIC).to(tl.int32, bitcast=True) - MAGIC_BITS
    finite = tl.where(magnitude < NORMAL, small, rounded - ((127 - BIAS) << MANTISSA))
    return (tl.where(x == x, finite, 0x7F) | sign).to(tl.int8)
