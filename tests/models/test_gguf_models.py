"""Models from GGUF files of every architecture, against the same weights from a folder."""

import re

import pytest
import torch

from aigc_fast.models.autoregressive import DecoderLM

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")

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
from tests.models.gguf_files import write_gguf
from tests.models.test_rope import scaled_config

# transformers' config says of these what GGUF cannot; llama.cpp runs Qwen without windows.
UNSAID = {"qwen2 late windows", "qwen3_moe windows, as they are", "gemma2 untied, no caps"} | {
    name for name in MODELS if name.endswith("other layers")
}


@pytest.mark.parametrize("name", sorted(MODELS.keys() - UNSAID))
def test_logits_agree_with_transformers(name, tmp_path):
    model_type, changes = MODELS[name]
    if model_type in OFFSET_NORMS:  # the default, by which llama.cpp divides
        changes = changes | {"query_pre_attn_scalar": 16}
    assert_agrees(hf_model(hf_config(model_type, **changes)), tmp_path)


def assert_agrees(hf, tmp_path):
    model = DecoderLM.from_pretrained(write_gguf(tmp_path / "model.gguf", hf))
    token_ids = torch.randint(VOCAB, (2, 21))
    with torch.no_grad():
        ours = model(token_ids)
    assert_error_ratio(ours, hf_logits(hf, token_ids), exact_logits(hf, token_ids))
    hf.save_pretrained(tmp_path / "folder")
    folder = DecoderLM.from_pretrained(tmp_path / "folder").state_dict()
    assert model.state_dict().keys() == folder.keys()
    assert all(torch.equal(value, folder[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["linear", "yarn", "yarn borders", "llama3"])
def test_rope_scaling_agrees_with_transformers(name, tmp_path):
    assert_agrees(hf_model(scaled_config(name, rope={"truncate": True})), tmp_path)


def test_old_linear_scaling(tmp_path):
    hf = hf_model(hf_config("llama"))
    path = write_gguf(tmp_path / "model.gguf", hf, **{"rope.scale_linear": 2.0})
    scaling = DecoderLM.from_pretrained(path).config.rope_scaling
    assert (scaling.kind, scaling.factor) == ("linear", 2.0)


@pytest.mark.parametrize("model_type, layers", [("gemma2", 46), ("gemma3_text", 62)])
def test_gemma_27b_has_a_scale_of_its_own(model_type, layers, tmp_path):
    hf = hf_model(hf_config(model_type, num_hidden_layers=layers, query_pre_attn_scalar=12))
    path = write_gguf(tmp_path / "model.gguf", hf)
    assert DecoderLM.from_pretrained(path).config.attention_scale == 12**-0.5


def test_no_experts_may_be_said_as_zero(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", hf_model(hf_config("llama")), expert_count=0)
    assert DecoderLM.from_pretrained(path).config.num_experts is None


@pytest.mark.parametrize("storage", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_stored_types_load(storage, tmp_path):
    """The weights are those of the package gguf, which quantised them; the layout is ours."""
    kind = gguf.GGMLQuantizationType[storage]
    changes = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4)
    hf = hf_model(hf_config("qwen2", **changes))
    model = DecoderLM.from_pretrained(write_gguf(tmp_path / "model.gguf", hf, kind))
    for weight in hf.state_dict().values():
        if weight.ndim == 2:
            stored = gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind)
            weight.copy_(torch.from_numpy(stored))
    expected = DecoderLM.from_hf_state_dict(model.config, hf.state_dict()).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rope.scaling.type": "longrope"}, "rope.scaling.type is 'longrope'"),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 2.0,
                "rope.scaling.attn_factor": 0.5,
            },
            "rope.scaling.attn_factor is not supported",
        ),
        ({"rope.scaling.type": "yarn"}, "'llama.rope.scaling.factor' is missing"),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": -2.0}, "must be positive"),
        ({"attention.sliding_window": "all"}, "must be of type int, got str"),
        ({"rope.freq_base": float("inf")}, "rope_theta must be positive and finite"),
    ],
)
def test_unfit_metadata_gives_one_clear_error(changes, message, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", hf_model(hf_config("llama")), **changes)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        DecoderLM.from_pretrained(path)
    assert str(path) in str(caught.value)
