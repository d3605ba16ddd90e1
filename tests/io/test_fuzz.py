"""Twenty thousand damaged models: each one loads, or raises ValueError or OSError; none takes
memory beyond a bound, whatever sizes it claims."""

import copy
import errno
import json
import math
import random
import resource
import struct
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

gguf = pytest.importorskip("gguf")
pytest.importorskip("safetensors")

import numpy as np
from safetensors.torch import save_file

from aigc_fast.io import load_tokenizer
from aigc_fast.models.autoregressive import DecoderLM
from tests.io.test_tokenizer_folder import write_folder as write_folder_tokenizer

FILES = 10_100  # of each format
BOUND = 256 << 20  # bytes of address space; the files have some ten thousand
SIZES = dict(vocab=40, hidden=32, inner=64, heads=4, kv_heads=2, head_dim=8)
NUMBERS = [0, 1, 2, 31, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]


def weights():
    hidden, inner, head_dim = SIZES["hidden"], SIZES["inner"], SIZES["head_dim"]
    shapes = {
        "token_embd": (SIZES["vocab"], hidden),
        "output_norm": (hidden,),
        "blk.0.attn_norm": (hidden,),
        "blk.0.attn_q": (SIZES["heads"] * head_dim, hidden),
        "blk.0.attn_k": (SIZES["kv_heads"] * head_dim, hidden),
        "blk.0.attn_v": (SIZES["kv_heads"] * head_dim, hidden),
        "blk.0.attn_output": (hidden, SIZES["heads"] * head_dim),
        "blk.0.ffn_norm": (hidden,),
        "blk.0.ffn_gate": (inner, hidden),
        "blk.0.ffn_up": (inner, hidden),
        "blk.0.ffn_down": (hidden, inner),
    }
    rng = np.random.default_rng(0)
    return {f"{k}.weight": rng.standard_normal(v).astype(np.float32) for k, v in shapes.items()}


def write_gguf(path):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(SIZES["vocab"])
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(SIZES["hidden"])
    writer.add_feed_forward_length(SIZES["inner"])
    writer.add_head_count(SIZES["heads"])
    writer.add_head_count_kv(SIZES["kv_heads"])
    writer.add_key_length(SIZES["head_dim"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_sliding_window(16)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(2.0)
    writer.add_token_list(["a", "b"])
    kinds = ["Q8_0", "F32", "F16", "Q4_1", "Q5_0", "BF16"]
    for (name, values), kind in zip(weights().items(), kinds * 2, strict=False):
        kind = gguf.GGMLQuantizationType[kind if values.ndim == 2 else "F32"]
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_folder(folder):
    from aigc_fast.models.autoregressive.architectures import ARCHITECTURES

    names = ARCHITECTURES["mistral"].names
    state = {}
    for name, values in weights().items():
        name = name.removeprefix("blk.0.").removesuffix(".weight")
        state[names[name].format(0) + ".weight"] = torch.from_numpy(values)
    half = len(state) // 2
    parts = [dict(list(state.items())[:half]), dict(list(state.items())[half:])]
    weight_map = {}
    for i, part in enumerate(parts):
        save_file(part, folder / f"{i}.safetensors")
        weight_map |= dict.fromkeys(part, f"{i}.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "model_type": "mistral",
        "vocab_size": SIZES["vocab"],
        "hidden_size": SIZES["hidden"],
        "num_hidden_layers": 1,
        "num_attention_heads": SIZES["heads"],
        "num_key_value_heads": SIZES["kv_heads"],
        "head_dim": SIZES["head_dim"],
        "intermediate_size": SIZES["inner"],
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "sliding_window": 16,
        "layer_types": ["sliding_attention"],
        "rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4},
    }
    (folder / "config.json").write_text(json.dumps(config))


def damage(rng, content, header):
    """A copy with one to three faults; most of them in the first `header` bytes."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        end = header if rng.random() < 0.9 else len(content)
        at = rng.randrange(max(1, min(end, len(content))))
        kind = rng.randrange(7)
        if kind == 0:
            del content[rng.choice([at, rng.randrange(len(content) + 1)]) :]
        elif kind == 1:
            content[at : at + 1] = bytes([content[at] ^ (1 << rng.randrange(8))] if content else [])
        elif kind == 2:
            size = rng.randrange(1, 9)
            content[at : at + size] = rng.randbytes(size)
        elif kind == 3:
            content[at : at + 8] = struct.pack("<Q", rng.choice(NUMBERS))
        elif kind == 4:
            content[at : at + 4] = struct.pack("<I", rng.choice(NUMBERS) & 0xFFFFFFFF)
        elif kind == 5:
            del content[at : at + rng.randrange(1, 9)]
        else:
            content[at:at] = content[at : at + rng.randrange(1, 64)]
        if not content:
            break
    if rng.random() < 0.02:
        content[:4] = rng.choice([b"GGML", b"PK\3\4", b"FUGG", bytes(4)])
    return bytes(content)


def damage_json(rng, value):
    """A copy where one value, key or entry is another."""
    value = copy.deepcopy(value)
    place, here = value, value
    while isinstance(here, (dict, list)) and here:
        key = rng.choice(list(here) if isinstance(here, dict) else range(len(here)))
        place, here = here, here[key]
        if rng.random() < 0.1:
            break
    if place is here:
        return value
    kind = rng.randrange(4)
    if kind == 0 and isinstance(place, dict):
        del place[key]
    elif kind == 1 and isinstance(place, dict):
        place[rng.choice(["", "x", "../x", "model.norm.weight"])] = place.pop(key)
    else:
        wild = [None, True, "", "x", "../x", "/", [], {}, [[]], -1, 0.5, -0.0, 1e308]
        wild += [math.inf, math.nan, 10**30, 2.0**64, "F64", "BF16", "I8", "0.safetensors"]
        place[key] = rng.choice([*wild, *NUMBERS])
    return value


@contextmanager
def limited_memory():
    """Within it, an allocation that passes BOUND fails, and with it the test."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + BOUND, hard))
    try:
        with pytest.raises(MemoryError):
            np.empty(2 * BOUND, np.uint8)
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture
def folder():
    """In memory where there is such a place: on a disk the twenty thousand files take ten times
    as long."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as path:
        yield Path(path)


def loads(path):
    try:
        model = DecoderLM.from_pretrained(path)
    except (ValueError, OSError) as error:
        assert f"os error {errno.ENOMEM}" not in str(error), error
        assert str(path) in str(error), error
        return False
    assert model.embed_tokens.weight.shape == (SIZES["vocab"], SIZES["hidden"])
    return True


def test_damaged_gguf_files(folder):
    write_gguf(folder / "sound.gguf")
    assert loads(folder / "sound.gguf")
    content = (folder / "sound.gguf").read_bytes()
    header = min(tensor.data_offset for tensor in gguf.GGUFReader(folder / "sound.gguf").tensors)
    rng, path, loaded = random.Random(0), folder / "damaged.gguf", 0
    with limited_memory():
        for _ in range(FILES):
            path.write_bytes(damage(rng, content, header))
            loaded += loads(path)
    assert 0 < loaded < FILES / 2


def test_damaged_folders(folder):
    write_folder(folder)
    assert loads(folder)
    files = sorted(folder.iterdir())
    sound = {path: path.read_bytes() for path in files}
    rng, loaded = random.Random(0), 0
    with limited_memory():
        for _ in range(FILES):
            path = rng.choice(files)
            path.write_bytes(damaged_part(rng, path, sound[path]))
            loaded += loads(folder)
            path.write_bytes(sound[path])
    assert 0 < loaded < FILES / 2


def damaged_part(rng, path, content):
    """Half of the faults leave the JSON well formed, so that they reach what reads it."""
    header = len(content)
    if path.suffix == ".safetensors":
        header = 8 + struct.unpack("<Q", content[:8])[0]
        if rng.random() < 0.5:
            fields = damage_json(rng, json.loads(content[8:header]))
            new = json.dumps(fields).encode()
            return struct.pack("<Q", len(new)) + new + content[header:]
    elif rng.random() < 0.5:
        return json.dumps(damage_json(rng, json.loads(content))).encode()
    return damage(rng, content, header)


def test_damaged_tokenizers(folder):
    """Some of these make the Rust code of the package tokenizers panic."""
    path = write_folder_tokenizer(folder) / "tokenizer.json"
    content = path.read_bytes()
    fields, rng, loaded = json.loads(content), random.Random(0), 0
    for _ in range(3000):
        if rng.random() < 0.6:
            path.write_bytes(json.dumps(damage_json(rng, fields)).encode())
        else:
            path.write_bytes(damage(rng, content, len(content)))
        try:
            tokenizer = load_tokenizer(folder)
            tokenizer.decode(tokenizer.encode("hello a</s>b é"))
            loaded += 1
        except (ValueError, OSError) as error:
            assert str(folder) in str(error)
    assert 0 < loaded < 3000
