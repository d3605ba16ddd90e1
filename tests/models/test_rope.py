"""Rotary embeddings and their scalings against transformers, frequency by frequency and whole."""

import math
import re
from dataclasses import replace

import pytest
import torch

from aigc_fast.models.autoregressive import DecoderLM, Engine, generate
from aigc_fast.models.autoregressive.architectures import ARCHITECTURES
from aigc_fast.models.autoregressive.load_hf import read_hf_config
from aigc_fast.models.autoregressive.rope import RopeScaling, attention_factor, inverse_frequencies

pytest.importorskip("transformers")

from tests.models.checkpoints import (
    SIZES,
    VOCAB,
    Exact,
    assert_error_ratio,
    exact_logits,
    hf_config,
    hf_logits,
    hf_model,
    naive_greedy,
    step_by_step,
)

# The original length is 16, the sequences are of 40.
SCALINGS = {
    "linear": dict(rope_type="linear", factor=3.0),
    "dynamic": dict(rope_type="dynamic", factor=4.0),
    "yarn": dict(rope_type="yarn", factor=4.0, rope_theta=1000.0),
    "yarn borders": dict(
        rope_type="yarn",
        factor=4.0,
        beta_fast=2.5,
        beta_slow=0.3,
        truncate=False,
        original_max_position_embeddings=12,
    ),
    "yarn factor": dict(rope_type="yarn", factor=8.0, attention_factor=0.7, beta_fast=4),
    "yarn mscale": dict(rope_type="yarn", factor=8.0, mscale=0.7, mscale_all_dim=1.3),
    "llama3": dict(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
        rope_theta=500000.0,
    ),
    "longrope": dict(rope_type="longrope", factor=4.0, original_max_position_embeddings=16),
    "longrope factor": dict(
        rope_type="longrope", original_max_position_embeddings=16, attention_factor=0.8
    ),
}


def scaled_config(name, **changes):
    # transformers gives the length before the scaling, but for Llama 3 and LongRoPE.
    length = 16 if SCALINGS[name]["rope_type"] in ("linear", "dynamic", "yarn") else 64
    parameters = {"rope_theta": 10000.0} | SCALINGS[name] | changes.pop("rope", {})
    if parameters["rope_type"] == "longrope":
        partial = parameters.get("partial_rotary_factor", 1.0)
        pairs = int(changes.get("head_dim", SIZES["head_dim"]) * partial) // 2
        parameters["short_factor"] = [1 + i / pairs for i in range(pairs)]
        parameters["long_factor"] = [1 + i for i in range(pairs)]
    model_type = changes.pop("model_type", "llama")
    return hf_config(
        model_type, **{"max_position_embeddings": length, "rope_parameters": parameters} | changes
    )


def ours(config):
    return read_hf_config(config.to_dict(), ARCHITECTURES[config.model_type], 99)


@pytest.mark.parametrize("partial", [1.0, 0.5])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_those_of_transformers(name, partial):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {} if partial == 1.0 else {"partial_rotary_factor": partial}
    config = scaled_config(name, head_dim=64, rope=rope)
    for length in (10, 40):
        with Exact():
            expected, factor = ROPE_INIT_FUNCTIONS[SCALINGS[name]["rope_type"]](
                config, seq_len=length
            )
        found = inverse_frequencies(ours(config), length)
        assert found.shape == (int(32 * partial),)
        torch.testing.assert_close(found, expected.double(), rtol=1e-6, atol=0)
        assert attention_factor(ours(config).rope_scaling) == pytest.approx(factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SCALINGS)
def test_scaled_models_agree_with_transformers(name, dtype, tmp_path):
    hf = hf_model(scaled_config(name), dtype)
    hf.save_pretrained(tmp_path)
    model = DecoderLM.from_pretrained(tmp_path, dtype=dtype)
    token_ids = torch.randint(VOCAB, (2, 40))
    with torch.no_grad():
        prompt = model(token_ids)
    assert_error_ratio(prompt, hf_logits(hf, token_ids), exact_logits(hf, token_ids))
    # Cached keys stay as they were rotated, so under dynamic scaling the chunks matter. So they do
    # for transformers' LongRoPE, but not for ours, which looks at the most a cache can hold.
    chunks = [] if "longrope" in name else [11, 9, *[1] * 20]
    theirs, exact = hf_logits(hf, token_ids, *chunks), exact_logits(hf, token_ids, *chunks)
    assert_error_ratio(step_by_step(model, token_ids, 11, 9), theirs, exact)


@pytest.mark.parametrize("name", ["linear", "dynamic", "yarn"])
def test_scaled_partial_rotary_agrees_with_transformers(name, tmp_path):
    config = scaled_config(
        name, model_type="stablelm", head_dim=None, rope={"partial_rotary_factor": 0.5}
    )
    hf = hf_model(config)
    hf.save_pretrained(tmp_path)
    model = DecoderLM.from_pretrained(tmp_path)
    assert model.config.rotary_dim == 6 and model.config.head_dim == 12
    token_ids = torch.randint(VOCAB, (2, 40))
    with torch.no_grad():
        prompt = model(token_ids)
    assert_error_ratio(prompt, hf_logits(hf, token_ids), exact_logits(hf, token_ids))


def test_scaling_lengthens_the_longest_sequence():
    reach = {name: ours(scaled_config(name)).max_position_embeddings for name in SCALINGS}
    assert reach == {
        "linear": 48,
        "dynamic": 64,
        "yarn": 64,
        "yarn borders": 48,
        "yarn factor": 128,
        "yarn mscale": 128,
        "llama3": 64,
        "longrope": 64,
        "longrope factor": 64,
    }


@pytest.mark.parametrize("capacity", [16, 17])
def test_longrope_looks_at_what_a_cache_can_hold(capacity):
    config = ours(scaled_config("longrope"))
    scaling = config.rope_scaling
    hf = hf_model(scaled_config("longrope"))
    model = DecoderLM.from_hf_state_dict(config, hf.state_dict()).double()
    factors = scaling.divisors if capacity == 16 else scaling.long_divisors
    plain = replace(scaling, divisors=factors, long_divisors=factors)
    expected = DecoderLM.from_hf_state_dict(
        replace(config, rope_scaling=plain), hf.state_dict()
    ).double()
    token_ids = torch.randint(VOCAB, (2, 12))
    with torch.no_grad():
        found = model(token_ids, model.new_cache(2, capacity))
        torch.testing.assert_close(found, expected(token_ids), rtol=1e-12, atol=1e-12)
        # Without a cache it is the length of the sequences, whatever table was made before.
        for ids, room in ((token_ids, 16), (torch.cat([token_ids] * 2, 1), 24)):
            assert torch.equal(model(ids), model(ids, model.new_cache(2, room)))


def test_requests_of_an_engine_share_the_frequencies_of_longrope():
    config = ours(scaled_config("longrope"))
    hf = hf_model(scaled_config("longrope"))
    model = DecoderLM.from_hf_state_dict(config, hf.state_dict()).double()
    long = replace(config.rope_scaling, divisors=config.rope_scaling.long_divisors)
    always_long = DecoderLM.from_hf_state_dict(
        replace(config, rope_scaling=long), hf.state_dict()
    ).double()
    prompts = [[1, 2, 3], list(range(14))]
    for answer, prompt in zip(generate(model, prompts, 10), prompts, strict=True):
        assert answer.tokens == naive_greedy(always_long, prompt, 10)
    [short] = generate(model, prompts[:1], 10)
    assert short.tokens == naive_greedy(model, prompts[0], 10)
    assert short.tokens != naive_greedy(always_long, prompts[0], 10)
    assert Engine(model).max_length == 64 and Engine(model, max_length=16).max_length == 16


def test_old_names_mean_the_same():
    new = scaled_config("yarn").to_dict()
    old = dict(new)
    rope = dict(old.pop("rope_parameters"))
    old["rope_theta"] = rope.pop("rope_theta")
    old["rope_scaling"] = {"type": rope.pop("rope_type")} | rope
    row = ARCHITECTURES["llama"]
    assert read_hf_config(old, row, 99) == read_hf_config(new, row, 99)


LONGROPE = dict(
    rope_type="longrope",
    original_max_position_embeddings=16,
    short_factor=[1] * 8,
    long_factor=[2.0] * 8,
)


@pytest.mark.parametrize(
    "rope, message",
    [
        ({"rope_type": "proportional"}, "rope_type is 'proportional'"),
        ({"rope_type": "longrope"}, "'original_max_position_embeddings' must be positive"),
        (LONGROPE | {"short_factor": None}, "'short_factor' must be a list, got None"),
        (LONGROPE | {"long_factor": ["2"]}, "'long_factor' must be of type float, got str"),
        (LONGROPE | {"long_factor": [2]}, "rope_scaling.long_divisors must be 8"),
        (
            LONGROPE | {"original_max_position_embeddings": 1},
            "rope_scaling.original_length must be above 1",
        ),
        ({"rope_type": ["yarn"]}, "rope_type is ['yarn']"),
        ({"rope_type": "linear"}, "'factor' is missing"),
        ({"rope_type": "linear", "factor": -1.0}, "rope_scaling.factor must be positive"),
        ({"rope_type": "linear", "factor": "2"}, "'factor' must be of type float, got str"),
        ({"rope_type": "linear", "factor": math.nan}, "rope_scaling.factor must be positive"),
        ({"rope_type": "llama3", "factor": 8.0}, "'low_freq_factor' is missing"),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4, "high_freq_factor": 4},
            "low_freq_factor must be below high_freq_factor",
        ),
        ({"rope_type": "yarn", "factor": 4.0, "rope_theta": 0.5}, "rope_theta must be above 1"),
        ({"rope_theta": 0.0}, "rope_theta must be positive"),
        ({"partial_rotary_factor": 1.5}, "'partial_rotary_factor' must be in (0, 1]"),
        ({"partial_rotary_factor": 0.2}, "rotary_dim must be even"),
        ({"full_attention": {"rope_theta": 1.0}}, "must be an object of plain values"),
        ({"rope_type": "linear", "factor": 2.0**1000}, None),
    ],
)
def test_bad_rope_parameters(rope, message):
    config = SIZES | {"rope_parameters": rope}
    if message is None:
        assert read_hf_config(config, ARCHITECTURES["llama"], 99).max_position_embeddings == 2**62
        return
    with pytest.raises(ValueError, match=re.escape(message)):
        read_hf_config(config, ARCHITECTURES["llama"], 99)


@pytest.mark.parametrize(
    "rope, expected",
    [
        ({"rope_local_base_freq": 5}, (1e6, None, 5.0)),
        ({"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 8}}, (7.0, 8.0, 1e4)),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 3}, "sliding_attention": None}},
            (3.0, None, 1e4),
        ),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "'sliding_attention' must be plain",
        ),
        ({"rope_parameters": {"full_attention": 5}}, "must be an object of plain values"),
        ({"rope_local_base_freq": "5"}, "'rope_local_base_freq' must be of type float, got str"),
        ({"rope_local_base_freq": -5.0}, "local_rope_theta must be positive"),
    ],
)
def test_rope_parameters_of_two_kinds_of_layers(rope, expected):
    config, row = SIZES | rope, ARCHITECTURES["gemma3_text"]
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=re.escape(expected)):
            read_hf_config(config, row, 99)
        return
    found = read_hf_config(config, row, 99)
    scaling = found.rope_scaling
    assert (found.rope_theta, scaling and scaling.factor, found.local_rope_theta) == expected


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, (True, True, True)),
        ({"num_hidden_layers": 4}, (True, True, True, False)),
        ({"no_rope_layer_interval": 2}, (True, False, True)),
        ({"no_rope_layers": [0, 1, 1], "no_rope_layer_interval": 2}, (False, True, True)),
        ({"no_rope_layers": [1, 1]}, "rope_layers must have one entry for each of 3"),
        ({"no_rope_layers": [1, 2, 1]}, "'no_rope_layers' must be a list of 0 and 1"),
        ({"no_rope_layers": 4}, "'no_rope_layers' must be a list of 0 and 1"),
        ({"no_rope_layer_interval": "4"}, "'no_rope_layer_interval' must be of type int"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
    ],
)
def test_layers_without_rotation(changes, expected):
    config, row = SIZES | changes, ARCHITECTURES["smollm3"]
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=re.escape(expected)):
            read_hf_config(config, row, 99)
    else:
        assert read_hf_config(config, row, 99).rope_layers == expected


def test_divisors_must_fit():
    with pytest.raises(ValueError, match="rope_scaling.divisors must be positive"):
        RopeScaling("divisors", divisors=(1.0, 0.0))
    with pytest.raises(ValueError, match="rope_scaling.kind must be one of"):
        RopeScaling("other")
