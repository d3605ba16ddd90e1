"""Hugging Face folders: sound ones are mapped, unsound or hostile ones give one clear error."""

import json
import os
import re
import struct
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from safetensors.torch import load_file, save_file

from aigc_fast.io import read_hf_folder
from aigc_fast.models.autoregressive import DecoderLM
from tests.models.checkpoints import hf_config, hf_model

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


@pytest.fixture
def folder(tmp_path):
    hf_model(hf_config("llama")).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def shards(tmp_path):
    hf_model(hf_config("llama")).save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    return tmp_path / "shards"


def edit(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def refused(path, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        DecoderLM.from_pretrained(path)
    assert str(path) in str(caught.value)


def test_shards_are_one_model(folder, shards):
    assert len(list(shards.glob("*.safetensors"))) >= 3
    whole, parts = (DecoderLM.from_pretrained(p).state_dict() for p in (folder, shards))
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())


def test_weights_stay_mapped_and_the_file_as_it_is(folder):
    before = (folder / SINGLE).read_bytes()
    model = DecoderLM.from_pretrained(folder)
    maps = Path("/proc/self/maps").read_text().splitlines()
    mapped = [line.split()[0].split("-") for line in maps if str(folder / SINGLE) in line]
    spans = [(int(begin, 16), int(end, 16)) for begin, end in mapped]
    for weight in (model.embed_tokens.weight, model.layers[0].attention.o_proj.weight):
        assert any(begin <= weight.data_ptr() < end for begin, end in spans)
    with torch.no_grad():
        model.embed_tokens.weight.zero_()
    assert (folder / SINGLE).read_bytes() == before


def test_a_model_saved_without_its_head_loads(tmp_path):
    hf = hf_model(hf_config("gpt2"))
    hf.save_pretrained(tmp_path / "whole")
    state = {
        name.removeprefix("transformer."): weight
        for name, weight in load_file(tmp_path / "whole" / SINGLE).items()
    }
    # What the files of 2019 carry: the mask of every layer.
    state |= {f"h.{i}.attn.bias": torch.ones(1, 1, 4, 4) for i in range(3)}
    (tmp_path / "bare").mkdir()
    save_file(state, tmp_path / "bare" / SINGLE)
    (tmp_path / "bare" / "config.json").write_bytes((tmp_path / "whole/config.json").read_bytes())
    whole, bare = (DecoderLM.from_pretrained(tmp_path / p).state_dict() for p in ("whole", "bare"))
    assert all(torch.equal(value, bare[key]) for key, value in whole.items())


def test_pickles_are_refused(folder):
    (folder / SINGLE).unlink()
    refused(folder, "there is neither model.safetensors nor")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    refused(folder, "pytorch_model.bin is a pickle")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'; supported are"),
        ({"model_type": None}, "model_type is None"),
        ({"model_type": ["llama"]}, "model_type is ['llama']"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"hidden_size": "72"}, "'hidden_size' must be of type int, got str"),
        ({"hidden_size": True}, "'hidden_size' must be of type int, got bool"),
        ({"hidden_size": -72}, "'hidden_size' must be positive, got -72"),
        ({"hidden_size": 2**70}, "hidden_size must be positive and finite"),
        ({"num_attention_heads": 0}, "'num_attention_heads' must be positive"),
        ({"num_key_value_heads": 4}, "num_kv_heads must divide num_heads"),
        ({"num_hidden_layers": 2**40}, "there are 1099511627776 layers, but 30 tensors"),
        ({"num_hidden_layers": 4}, "'model.layers.3.input_layernorm.weight' is missing"),
        ({"num_hidden_layers": 2}, "no use is known for tensor 'model.layers.2"),
        ({"vocab_size": 2**40}, "'model.embed_tokens.weight' must have shape (1099511627776, 72)"),
        ({"intermediate_size": 101}, "mlp.gate_proj.weight' must have shape (101, 72)"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps must be positive and finite"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        ({"attention_bias": True}, "q_proj.bias' is missing"),
        ({"attention_bias": 1}, "'attention_bias' must be of type bool, got int"),
        (
            {"model_type": "mistral", "layer_types": ["full_attention"]},
            "windows must have one entry for each of 3 layers, got 1",
        ),
        ({"model_type": "mistral", "layer_types": [[], {}, 3]}, "'layer_types' must be a list of"),
        ({"model_type": "mistral", "sliding_window": 0}, "windows must be positive"),
        ({"model_type": "mistral", "sliding_window": 1.5}, "'sliding_window' must be of type int"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": "x"},
            "'max_window_layers' must be of type int, got str",
        ),
    ],
)
def test_unfit_config_gives_one_clear_error(folder, changes, message):
    edit(folder / "config.json", **changes)
    refused(folder, message)


@pytest.mark.parametrize("off", [None, False, {}])
def test_what_is_off_may_be_said(folder, off):
    edit(folder / "config.json")
    content = json.loads((folder / "config.json").read_text()) | {"quantization_config": off}
    (folder / "config.json").write_text(json.dumps(content))
    DecoderLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[" * 10**5, b"[1]", b'{"a": 1' + b"0" * 5000]
)
def test_config_that_is_not_json(folder, content):
    (folder / "config.json").write_bytes(content)
    refused(folder, "config.json: ")


@pytest.mark.parametrize(
    "shard",
    [
        "../other.safetensors",
        "/etc/passwd",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "c:x.safetensors",
        "x\0.safetensors",
        "x.bin",
        "..",
        "",
        None,
        3,
        ["x.safetensors"],
    ],
)
def test_an_index_cannot_name_files_elsewhere(shards, shard):
    (shards.parent / "other.safetensors").write_bytes(b"not to be read")
    weight_map = json.loads((shards / INDEX).read_text())["weight_map"]
    edit(shards / INDEX, weight_map=weight_map | {"lm_head.weight": shard})
    refused(shards, "a shard must be the plain name of a .safetensors file")


@pytest.mark.parametrize("weight_map", [None, {}, [], "x", 3])
def test_an_index_must_have_a_map(shards, weight_map):
    edit(shards / INDEX, weight_map=weight_map)
    refused(shards, "'weight_map' must be an object that is not empty")


def test_missing_shards_and_tensors_are_named(shards):
    weight_map = json.loads((shards / INDEX).read_text())["weight_map"]
    edit(shards / INDEX, weight_map=weight_map | {"lm_head.weight": "absent.safetensors"})
    refused(shards, "the shard 'absent.safetensors' is missing")
    files = list(weight_map.values())
    first = next(file for file in files if files.count(file) > 1)
    edit(shards / INDEX, weight_map=weight_map | {"other.weight": first})
    refused(shards, "tensor 'other.weight' is missing")
    edit(shards / INDEX, weight_map=weight_map)
    save_file(load_file(shards / first), shards / "twice.safetensors")
    name = next(iter(load_file(shards / first)))
    edit(shards / INDEX, weight_map=weight_map | {name: "twice.safetensors"})
    refused(shards, "is in another shard too")


def test_cut_shard_is_refused(shards):
    shard = sorted(shards.glob("*.safetensors"))[-1]
    content = shard.read_bytes()
    for size in (0, 7, 8, 100, len(content) - 1):
        shard.write_bytes(content[:size])
        refused(shards, str(shard.name))


def rewrite(path, change):
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    change(header)
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + content[8 + size :])


@pytest.mark.parametrize(
    "name, change",
    [
        ("model.norm.weight", {"dtype": "X32"}),
        ("model.norm.weight", {"shape": [2**40, 2**40]}),
        ("model.norm.weight", {"shape": [-1]}),
        ("model.norm.weight", {"data_offsets": [0, 2**60]}),
        ("model.norm.weight", {"data_offsets": [4, 0]}),
        ("model.norm.weight", {"shape": [71]}),
    ],
)
def test_unsound_headers_are_refused(folder, name, change):
    rewrite(folder / SINGLE, lambda header: header[name].update(change))
    refused(folder, "model.safetensors: not a sound safetensors file")


def test_other_dtypes_are_named(folder):
    rewrite(folder / SINGLE, lambda header: header["model.norm.weight"].update(dtype="I32"))
    refused(folder, "'model.norm.weight' must be one of ['BF16', 'F16', 'F32', 'F64'], got I32")


def test_missing_folder_and_files_are_os_errors(tmp_path):
    with pytest.raises(FileNotFoundError):
        DecoderLM.from_pretrained(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=re.escape("config.json")):
        read_hf_folder(tmp_path)


def test_a_folder_in_place_of_the_weights_is_refused(folder):
    (folder / SINGLE).unlink()
    os.mkdir(folder / SINGLE)
    refused(folder, "there is neither model.safetensors")
