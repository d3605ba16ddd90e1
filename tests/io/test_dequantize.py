"""Storage types of GGUF, decoded one value at a time as ggml's C structs lay them out.

Source: ggml-common.h and dequantize_row_* in ggml-quants.c of https://github.com/ggml-org/ggml.
"""

import struct

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")

from aigc_fast.io import read_gguf


def half(block, at):
    return struct.unpack_from("<e", block, at)[0]


def nibble(byte, high):
    return byte >> 4 if high else byte & 15


def q4_0(b):
    return [half(b, 0) * (nibble(b[2 + i % 16], i >= 16) - 8) for i in range(32)]


def q4_1(b):
    return [half(b, 0) * nibble(b[4 + i % 16], i >= 16) + half(b, 2) for i in range(32)]


def q5_0(b):
    fifth = struct.unpack_from("<I", b, 2)[0]
    low = (nibble(b[6 + i % 16], i >= 16) for i in range(32))
    return [half(b, 0) * ((q | (fifth >> i & 1) << 4) - 16) for i, q in enumerate(low)]


def q5_1(b):
    fifth = struct.unpack_from("<I", b, 4)[0]
    low = (nibble(b[8 + i % 16], i >= 16) for i in range(32))
    return [half(b, 0) * (q | (fifth >> i & 1) << 4) + half(b, 2) for i, q in enumerate(low)]


def q8_0(b):
    return [half(b, 0) * q for q in struct.unpack_from("<32b", b, 2)]


def scale_min(scales, j):
    """get_scale_min_k4: eight 6-bit scales and minimums in twelve bytes."""
    if j < 4:
        return scales[j] & 63, scales[j + 4] & 63
    return (
        (scales[j + 4] & 15) | (scales[j - 4] >> 6) << 4,
        (scales[j + 4] >> 4) | (scales[j] >> 6) << 4,
    )


def q4_k(b):
    values = []
    for i in range(256):
        scale, minimum = scale_min(b[4:16], i // 32)
        q = nibble(b[16 + i // 64 * 32 + i % 32], i // 32 % 2)
        values.append(half(b, 0) * scale * q - half(b, 2) * minimum)
    return values


def q5_k(b):
    values = []
    for i in range(256):
        scale, minimum = scale_min(b[4:16], i // 32)
        q = nibble(b[48 + i // 64 * 32 + i % 32], i // 32 % 2)
        q |= (b[16 + i % 32] >> i // 32 & 1) << 4
        values.append(half(b, 0) * scale * q - half(b, 2) * minimum)
    return values


def q6_k(b):
    values = []
    for i in range(256):
        part, group, lane = i // 128, i % 128 // 32, i % 32
        low = nibble(b[part * 64 + group % 2 * 32 + lane], group >= 2)
        high = b[128 + part * 32 + lane] >> 2 * group & 3
        scale = struct.unpack_from("<b", b, 192 + i // 16)[0]
        values.append(half(b, 208) * scale * ((low | high << 4) - 32))
    return values


def f16(b):
    return [half(b, 0)]


def bf16(b):
    return [struct.unpack("<f", b"\0\0" + b)[0]]


DECODERS = {f.__name__.upper(): f for f in (q4_0, q4_1, q5_0, q5_1, q8_0, q4_k, q5_k, q6_k)}
DECODERS |= {"F16": f16, "BF16": bf16}


@pytest.mark.parametrize("name", DECODERS)
def test_every_value_is_what_the_struct_says(name, tmp_path):
    kind = gguf.GGMLQuantizationType[name]
    size, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (6, num_bytes), dtype=np.uint8)
    if not name.endswith("16"):  # random halves may be infinite: scales of ordinary size
        scales = rng.uniform(0.01, 2, (6, 2)).astype("<f2").view(np.uint8)
        at, count = {"Q6_K": (208, 2)}.get(name, (0, 4 if name[-1] in "1K" else 2))
        blocks[:, at : at + count] = scales[:, :count]
    else:
        blocks[:, 1] &= 0x3F
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tensor("t", blocks.reshape(3, -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = read_gguf(tmp_path / "t.gguf").tensors["t"]
    assert tensor.type_name == name and tensor.shape == (3, 2 * size)
    expected = np.array([DECODERS[name](block.tobytes()) for block in blocks])
    found = tensor.dequantize().numpy().reshape(6, size)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
