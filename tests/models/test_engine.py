"""Engine and generate: requests that join and leave, share pages, stop, are cancelled."""

import gc
import math
import re
import threading
import weakref

import numpy as np
import pytest
import torch

import aigc_fast
from aigc_fast.models.autoregressive import (
    DecoderLM,
    Engine,
    Sampling,
    calibrate_cache,
    generate,
    stream,
)
from aigc_fast.models.autoregressive.cache_scales import NARROW
from tests.models.checkpoints import naive_greedy
from tests.models.test_decoder_lm import TINY, random_model


class Letters:
    """A tokenizer of seventeen letters."""

    stop_tokens = ()

    def encode(self, text):
        return [ord(letter) - ord("a") for letter in text]

    def stream_decoder(self):
        return lambda token: chr(ord("a") + token)


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A model whose decoding step is one operator, in float32."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("transformers")
    from tests.models.test_packed import written

    path = written(tmp_path_factory.mktemp("packed"), "llama", "Q8_0")
    assert gguf
    return DecoderLM.from_pretrained(path, packed=True)


def run(engine):
    """Steps until nothing is left; the updates."""
    updates = []
    while not engine.idle:
        updates += engine.step()
    assert engine.pool.available == engine.pool.num_pages
    return updates


def tokens(requests):
    return [request.tokens for request in requests]


PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7], [16, 0, 9], [3, 3, 3, 3]]


# ---- generate -------------------------------------------------------------------------------


def test_a_request_shows_itself_in_short(model):
    [request] = generate(model, PROMPTS[:1], 12, tokenizer=Letters())
    assert len(request.text) == 12
    assert repr(request) == f"Request(text={request.text!r}, 12 tokens, finish_reason='length')"
    request.text *= 10
    assert len(repr(request)) < 80


def test_prompts_of_different_lengths_are_independent(model):
    expected = [naive_greedy(model, prompt, 12) for prompt in PROMPTS]
    assert tokens(generate(model, PROMPTS, 12)) == expected
    assert tokens(generate(model, PROMPTS[:1], 12)) == expected[:1]
    updates = list(stream(model, PROMPTS[1:2], 12))
    assert [update.tokens for update in updates] == [[token] for token in expected[1]]
    assert [update.finish_reason for update in updates] == [None] * 11 + ["length"]


def test_generation_stops_at_a_stop_token(model):
    free = generate(model, PROMPTS, 12)
    stop = free[0].tokens[3]
    stopped = generate(model, PROMPTS, 12, stop_tokens=[stop])
    for request, full in zip(stopped, tokens(free), strict=True):
        end = full.index(stop) + 1 if stop in full else 12
        assert request.tokens == full[:end]
        assert request.finish_reason == ("stop" if stop in full else "length")


def test_text_ends_before_a_stop_string(model):
    letters = Letters()
    [free] = generate(model, ["bcdefgh"], 12, tokenizer=letters)
    assert free.text == "".join(map(letters.stream_decoder(), free.tokens))
    stop = free.text[4:6]
    at = free.text.index(stop)
    [request] = generate(model, ["bcdefgh"], 12, tokenizer=letters, stop_strings=["zz", stop])
    assert request.text == free.text[:at]
    assert request.tokens == free.tokens[: at + 2] and request.finish_reason == "stop"
    updates = list(stream(model, ["bcdefgh"], 12, tokenizer=letters, stop_strings=[stop]))
    assert "".join(update.text for update in updates) == free.text[:at]


def test_logprobs_are_of_the_model_s_own_distribution(model):
    sampling = Sampling(temperature=2.0, top_k=5, seed=3)
    [request] = generate(model, PROMPTS[1:2], 6, sampling=sampling)
    ids = torch.tensor([request.prompt + request.tokens])
    with torch.no_grad():
        expected = model(ids).log_softmax(-1)[0, len(request.prompt) - 1 : -1]
    ours = torch.tensor(request.logprobs, dtype=torch.float64)
    at = torch.tensor(request.tokens)[:, None]
    torch.testing.assert_close(ours, expected.gather(1, at)[:, 0], rtol=1e-5, atol=1e-6)


def test_streaming_leaves_the_mode_of_the_caller_alone(model):
    for _ in stream(model, [[1, 2]], 3):
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


# ---- sampling -------------------------------------------------------------------------------


@pytest.mark.parametrize("draft_tokens", [0, 3])
def test_a_seed_gives_the_same_text_whatever_the_batch(packed, draft_tokens):
    prompts = [[1, 2, 3], [4], [5, 6]]
    sampling = Sampling(temperature=1.5, top_k=30, top_p=0.95, min_p=0.001, seed=11)
    together = tokens(generate(packed, prompts, 10, sampling=sampling))
    again = generate(packed, prompts, 10, sampling=sampling, draft_tokens=draft_tokens)
    assert tokens(again) == together
    alone = Sampling(**vars(sampling) | {"seed": 12})
    assert tokens(generate(packed, prompts[1:2], 10, sampling=alone)) == together[1:2]
    other = Sampling(**vars(sampling) | {"seed": 99})
    assert tokens(generate(packed, prompts, 10, sampling=other)) != together


def test_every_request_has_its_own_sampling(packed):
    samplings = [
        Sampling(),
        Sampling(temperature=2.0, seed=5),
        Sampling(temperature=2.0, top_k=3, presence_penalty=2.0, seed=5),
        Sampling(frequency_penalty=-50.0),
    ]
    engine = Engine(packed)
    requests = [engine.add([1, 2, 3], 10, sampling=sampling) for sampling in samplings]
    run(engine)
    for request, sampling in zip(requests, samplings, strict=True):
        assert tokens(generate(packed, [[1, 2, 3]], 10, sampling=sampling)) == [request.tokens]
    assert len(set(map(tuple, tokens(requests)))) == 4


def test_no_seed_draws_from_torch(packed):
    def draw(seed):
        torch.manual_seed(seed)
        return tokens(generate(packed, [[1, 2]], 16, sampling=Sampling(temperature=2.0)))

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


def test_top_k_of_one_is_greedy(packed):
    drawn = generate(packed, [[1, 2]], 8, sampling=Sampling(temperature=3.0, top_k=1, seed=0))
    assert tokens(drawn) == tokens(generate(packed, [[1, 2]], 8))


def test_penalties_count_prompt_and_new_tokens(packed):
    # Every token at most once: what was generated is pushed below all others.
    once = generate(packed, [[1, 2], [3]], 20, sampling=Sampling(presence_penalty=1e5))
    assert all(len(set(request.tokens)) == 20 for request in once)
    prompts = [list(range(40)), [5]]
    new = generate(packed, prompts, 1, sampling=Sampling(repetition_penalty=1e5))
    assert new[0].tokens[0] >= 40


# ---- drafts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_drafts_change_nothing_but_the_number_of_steps(packed, temperature):
    sampling = Sampling(temperature=temperature, seed=1)
    prompts = [[1, 2, 3, 4] * 4, [7, 8, 9] * 3, [5]]
    plain = generate(packed, prompts, 40, sampling=sampling)
    updates = list(stream(packed, prompts, 40, sampling=sampling, draft_tokens=4))
    for request in plain:
        drafted = [u for u in updates if u.request.prompt == request.prompt]
        assert [token for u in drafted for token in u.tokens] == request.tokens
        assert [p for u in drafted for p in u.logprobs] == request.logprobs
    if temperature == 0.0:  # where a greedy answer comes to repeat itself
        assert len(updates) < 3 * 40


def test_a_stop_token_inside_a_draft_ends_the_answer(packed):
    [plain] = generate(packed, [[1, 2, 3, 4] * 4], 40)
    for at in range(20, 40):
        stop = plain.tokens[at]
        expected = plain.tokens[: plain.tokens.index(stop) + 1]
        options = dict(draft_tokens=6, stop_tokens=[stop])
        [drafted] = generate(packed, [[1, 2, 3, 4] * 4], 40, **options)
        assert drafted.tokens == expected


# ---- requests that come and go --------------------------------------------------------------


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("max_batch_size", [1, 2, 8])
def test_requests_join_and_leave_a_running_batch(model, page_size, max_batch_size):
    engine = Engine(model, num_pages=200, page_size=page_size, max_batch_size=max_batch_size)
    lengths = [12, 3, 7, 1]
    requests = []
    for prompt, new in zip(PROMPTS, lengths, strict=True):
        requests.append(engine.add(prompt, new))
        engine.step()
        engine.step()
    run(engine)
    for request, prompt, new in zip(requests, PROMPTS, lengths, strict=True):
        assert request.tokens == naive_greedy(model, prompt, new)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_prompts_in_chunks_give_the_same_answer(model, chunk):
    prompt = [i * 7 % 17 for i in range(23)]
    engine = Engine(model, num_pages=40, page_size=4, prefill_chunk=chunk)
    request = engine.add(prompt, 5)
    steps = 0
    while not request.tokens:
        engine.step()
        steps += 1
    assert steps == -(-len(prompt) // chunk)
    run(engine)
    assert request.tokens == naive_greedy(model, prompt, 5)


def test_a_chunk_lets_running_requests_go_on(model):
    engine = Engine(model, prefill_chunk=4)
    first = engine.add([1, 2], 20)
    engine.step()
    engine.add(list(range(16)), 2)
    for _ in range(3):
        before = len(first.tokens)
        engine.step()
        assert len(first.tokens) == before + 1


def test_prompts_that_begin_alike_are_computed_once(model, monkeypatch):
    computed = []
    hidden_states = DecoderLM.hidden_states

    def counting(self, token_ids, cache=None):
        computed.append(token_ids.numel())
        return hidden_states(self, token_ids, cache)

    monkeypatch.setattr(DecoderLM, "hidden_states", counting)
    engine = Engine(model, num_pages=40, page_size=4)
    beginning = [i * 5 % 17 for i in range(20)]
    first = engine.add([*beginning, 1], 6)
    run(engine)
    assert sum(computed) == 21 + 5
    computed.clear()
    # Another ending, and a conversation that goes on from the answer.
    second = engine.add([*beginning, 2, 3], 1)
    third = engine.add([*first.prompt, *first.tokens, 4], 1)
    run(engine)
    assert computed == [2, 28 - 24]
    for request in (second, third):
        assert request.tokens == naive_greedy(model, request.prompt, 1)


def test_requests_wait_for_pages_and_get_them(model):
    engine = Engine(model, num_pages=6, page_size=4)  # one request at a time
    requests = [engine.add(prompt, 12) for prompt in PROMPTS]
    run(engine)
    for request, prompt in zip(requests, PROMPTS, strict=True):
        assert request.tokens == naive_greedy(model, prompt, 12)


def test_cancelled_requests_leave_no_pages_behind(model):
    engine = Engine(model, num_pages=40, page_size=2, prefill_chunk=2, max_batch_size=2)
    requests = [engine.add(prompt, 12) for prompt in [*PROMPTS, [1, 2, 3, 4, 5, 6, 7, 8]]]
    for _ in range(5):
        engine.step()
    running, waiting = requests[0], requests[-1]
    assert running.tokens and not waiting.tokens
    kept = list(running.tokens)
    for request in (running, waiting, running):
        engine.cancel(request)
    assert running.tokens == kept and running.finish_reason == "cancelled"
    run(engine)
    for request, prompt in zip(requests[1:-1], PROMPTS[1:], strict=True):
        assert request.tokens == naive_greedy(model, prompt, 12)


def test_a_closed_stream_stops_all_work(model, monkeypatch):
    step, engines = Engine.step, []
    monkeypatch.setattr(
        Engine, "step", lambda self: engines.append(weakref.ref(self)) or step(self)
    )
    updates = stream(model, PROMPTS, 12)
    next(updates)
    assert len(engines) == 1 and engines[0]() is not None
    updates.close()
    gc.collect()
    assert len(engines) == 1 and engines[0]() is None  # with its pages


def test_logits_that_are_not_finite_change_nothing(model, monkeypatch):
    engine = Engine(model)
    requests = [engine.add(prompt, 6) for prompt in PROMPTS[:2]]
    for _ in range(3):
        engine.step()
    before = [list(request.tokens) for request in requests]
    logits = DecoderLM.logits
    monkeypatch.setattr(DecoderLM, "logits", lambda self, hidden: logits(self, hidden) * torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        engine.step()
    assert tokens(requests) == before
    monkeypatch.setattr(DecoderLM, "logits", logits)
    run(engine)
    for request in requests:
        assert request.tokens == naive_greedy(model, request.prompt, 6)


def test_a_prompt_whose_logits_are_not_finite_loses_no_token_of_the_others(model, monkeypatch):
    engine = Engine(model)
    requests = [engine.add(prompt, 3) for prompt in PROMPTS[:2]]
    while not all(request.tokens for request in requests):
        engine.step()
    poisoned = engine.add(PROMPTS[2], 3)
    before, logits = [list(request.tokens) for request in requests], DecoderLM.logits

    def of_a_prompt(self, hidden):  # one row, where the two that run have two
        return logits(self, hidden) * (torch.nan if len(hidden) == 1 else 1)

    monkeypatch.setattr(DecoderLM, "logits", of_a_prompt)
    for _ in range(2):
        with pytest.raises(ValueError, match="NaN"):
            engine.step()
        assert tokens(requests) == before
    engine.cancel(poisoned)
    monkeypatch.setattr(DecoderLM, "logits", logits)
    run(engine)
    for request in requests:
        assert request.tokens == naive_greedy(model, request.prompt, 3)


@pytest.mark.parametrize("fused", [True, False])
def test_keys_and_values_in_another_dtype(packed, fused, monkeypatch):
    """Half precision caches: close to the model's own dtype, chunks and drafts included."""
    if not fused:
        monkeypatch.setattr(DecoderLM, "_fused_step", lambda *_: None)
    prompt = [i * 7 % 100 for i in range(40)]
    results = []
    for dtype in (None, torch.float16):
        engine = Engine(packed, prefill_chunk=16, cache_dtype=dtype)
        assert engine._memory[0].dtype == (dtype or torch.float32)
        request = engine.add(prompt, 8)
        run(engine)
        results.append(torch.tensor(request.logprobs))
    assert not torch.equal(*results)
    torch.testing.assert_close(*results, rtol=0, atol=0.02)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_pages_of_one_byte(packed, dtype):
    """Answers are those of a contiguous cache: prompts in chunks, drafts, a shared beginning."""
    prompt = [i * 7 % 100 for i in range(40)]
    engine = Engine(packed, prefill_chunk=16, page_size=8, cache_dtype=dtype)
    assert engine._memory[0].dtype == dtype
    first = engine.add(prompt, 8, draft_tokens=2)
    run(engine)
    second = engine.add([*prompt, 5, 6], 4)
    engine.step()
    assert len(second.held.shared) == 5  # all the full ones
    run(engine)
    scales = calibrate_cache(packed, dtype) if dtype == torch.int8 else None
    for request, steps in ((first, [16, 16, 8]), (second, [16, 16, 8, 2])):
        cache = packed.new_cache(1, 64, dtype, scales)
        pieces = torch.tensor([request.prompt]).split(steps, 1)
        expected, logprobs = [], []
        with torch.inference_mode():
            for piece in pieces:
                logits = packed(piece, cache)[0, -1]
            for _ in request.tokens:
                expected.append(int(logits.argmax()))
                logprobs.append(float(logits.log_softmax(-1).max()))
                logits = packed(torch.tensor([expected[-1:]]), cache)[0, -1]
        assert request.tokens == expected
        assert request.logprobs == pytest.approx(logprobs, abs=1e-4)


@pytest.mark.parametrize("fused", [True, False])
def test_caches_of_one_byte_round_the_logits(packed, fused, monkeypatch):
    """As their formats do: bfloat16 rounds a number by 2^-8 of itself, float8_e4m3fn by 2^-4,
    float8_e5m2 by 2^-3, int8 by 2^-7 of the largest, which is a few times the others."""
    if not fused:
        monkeypatch.setattr(DecoderLM, "_fused_step", lambda *_: None)
    token_ids = torch.tensor([[i * 7 % 100 for i in range(40)]])
    logits = {}
    for dtype in (torch.float32, torch.bfloat16, *NARROW):
        scales = calibrate_cache(packed, dtype) if dtype == torch.int8 else None
        cache = packed.new_cache(1, 40, dtype, scales)
        with torch.no_grad():
            pieces = token_ids.split([16, 16, *[1] * 8], 1)
            logits[dtype] = torch.cat([packed(piece, cache) for piece in pieces], 1)
    wide = logits.pop(torch.float32)
    errors = {}
    for dtype, narrow in logits.items():
        assert torch.equal(narrow[:, :16], wide[:, :16])  # nothing is read from the cache yet
        errors[dtype] = (narrow - wide)[:, 16:].square().mean().sqrt()
    for dtype, limit in zip(NARROW, (8, 16, 32), strict=True):
        assert 0 < errors[dtype] < limit * errors[torch.bfloat16]


def test_scales_of_caches(packed):
    scales = calibrate_cache(packed, torch.int8)
    config = packed.config
    assert scales.shape == (2 * config.num_layers, config.num_kv_heads)
    # Of all tokens there are, these are the largest numbers.
    every = calibrate_cache(packed, torch.int8, torch.arange(config.vocab_size)[None, :60])
    assert (every < 3 * scales).all() and (scales < 3 * every).all()
    [expected] = generate(packed, [[1, 2, 3]], 8, cache_dtype=torch.int8)
    [found] = generate(packed, [[1, 2, 3]], 8, cache_dtype=torch.int8, cache_scales=scales)
    assert found.logprobs == expected.logprobs
    # Far too small, all that is stored is the largest number: it shows.
    [cut] = generate(packed, [[1, 2, 3]], 8, cache_dtype=torch.int8, cache_scales=scales / 1e3)
    assert cut.logprobs[1:] != expected.logprobs[1:]


SCALES = torch.ones(2 * TINY.num_layers, TINY.num_kv_heads)


@pytest.mark.parametrize(
    "dtype, scales, error, message",
    [
        (torch.int64, None, TypeError, "cache_dtype must be one of"),
        (
            torch.float16,
            torch.ones(4, 2),
            ValueError,
            "cache_scales must be None for torch.float16",
        ),
        (torch.int8, torch.ones(2), ValueError, "cache_scales must have shape"),
        (torch.int8, [1.0], TypeError, "cache_scales must be a float32 tensor, got list"),
        (torch.int8, SCALES.double(), TypeError, "cache_scales must be a float32 tensor"),
        (torch.int8, SCALES * 0, ValueError, "cache_scales must be positive and finite"),
    ],
)
def test_bad_caches(model, dtype, scales, error, message):
    with pytest.raises(error, match=re.escape(message)):
        Engine(model, cache_dtype=dtype, cache_scales=scales)
    with pytest.raises(ValueError, match="scales must be given for int8: calibrate_cache"):
        model.new_cache(1, 4, torch.int8)
    with pytest.raises(TypeError, match="dtype must be one of"):
        calibrate_cache(model, torch.float16)


# ---- what is refused ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompts, new, options, error, message",
    [
        ([], 1, {}, ValueError, "at least one prompt"),
        ([[1], []], 1, {}, ValueError, "prompt must not be empty"),
        ([1, 2], 1, {}, TypeError, "prompt must hold token ids, got int"),
        ("text", 1, {}, TypeError, "prompts must be a list of prompts, got one text"),
        (["text"], 1, {}, ValueError, "a prompt in text needs a tokenizer, but there is none"),
        ([[1.5]], 1, {}, TypeError, "each id of prompt must be an integer, got float"),
        ([[1, 17]], 1, {}, ValueError, "prompt must lie in [0, 17), got 17"),
        ([[1]], 0, {}, ValueError, "max_new_tokens must be positive, got 0"),
        ([[1] * 60], 6, {}, ValueError, "need 65 positions; the model knows 64"),
        ([[1]], 1, {"stop_tokens": [17]}, ValueError, "stop_tokens must lie in [0, 17), got 17"),
        (
            [[1]],
            1,
            {"stop_strings": ["a"]},
            ValueError,
            "stop_strings: there is no tokenizer",
        ),
        ([[1]], 1, {"draft_tokens": -1}, ValueError, "draft_tokens must not be negative, got -1"),
        ([[1]], 1, {"draft_tokens": 1.5}, TypeError, "draft_tokens must be an integer, got float"),
        ([[1]], "1", {}, TypeError, "max_new_tokens must be an integer, got str"),
        ([[1]], 1 << 40, {}, ValueError, "max_new_tokens must be below 2**31"),
        ([[1]], 1 << 30, {}, ValueError, "need 1073741824 positions; the model knows 64"),
        (None, 1, {}, TypeError, "prompts must be a list of prompts, got NoneType"),
        ([{}], 1, {}, TypeError, "prompt must hold token ids, got dict"),
        ([b"a"], 1, {}, TypeError, "prompt must hold token ids, got bytes"),
        ([[True]], 1, {}, TypeError, "each id of prompt must be an integer, got bool"),
        (torch.tensor(1), 1, {}, TypeError, "prompt must have one dimension, got shape ()"),
        (torch.ones(1, 1, 1), 1, {}, TypeError, "prompt must have one dimension, got shape (1, 1)"),
        (torch.ones(1, 1), 1, {}, TypeError, "each id of prompt must be an integer, got float"),
        ([[1]], 1, {"sampling": {"top_k": 1}}, TypeError, "sampling must be a Sampling, got dict"),
        ([[1]], 1, {"sampling": Sampling}, TypeError, "sampling must be a Sampling, got a class"),
        ([[1]], 1, {"stop_tokens": None}, TypeError, "stop_tokens must hold token ids"),
        ([[1]], 1, {"stop_tokens": 5.0}, TypeError, "stop_tokens must hold token ids, got float"),
        ([[1]], 1, {"tokenizer": "gpt2"}, TypeError, "tokenizer must be a TextTokenizer, got str"),
        ([[1]], 1, {"top_k": 5}, TypeError, "top_k is no argument: those left are ['draft_tokens'"),
    ],
)
def test_bad_generation_arguments(model, prompts, new, options, error, message):
    # Without a single step taken: the arguments are checked at once.
    with pytest.raises(error, match=re.escape(message)):
        stream(model, prompts, new, **options)


@pytest.mark.parametrize(
    "stop_strings, error, message",
    [
        ("stop", TypeError, "stop_strings must be a list of strings, got str"),
        (None, TypeError, "stop_strings must be a list of strings, got NoneType"),
        ([5], TypeError, "each of stop_strings must be a str, got int"),
        ([""], ValueError, "stop_strings must not hold an empty string"),
    ],
)
def test_bad_stop_strings(model, stop_strings, error, message):
    with pytest.raises(error, match=message):
        Engine(model, Letters()).add([1], 1, stop_strings=stop_strings)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"temperature": -1.0}, ValueError, "temperature must be from 0 to inf, got -1"),
        ({"temperature": math.nan}, ValueError, "temperature must be from 0 to inf, got nan"),
        ({"top_p": 2}, ValueError, "top_p must be from 0 to 1, got 2"),
        ({"top_k": 1.5}, TypeError, "top_k must be int, got 1.5"),
        ({"temperature": "hot"}, TypeError, "temperature must be float, got 'hot'"),
        ({"seed": 1.5}, TypeError, "seed must be int | None, got 1.5"),
        ({"seed": 2**63}, ValueError, "seed must fit in int64"),
    ],
)
def test_bad_sampling_is_refused_before_it_can_stop_a_batch(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        Sampling(**options)


def test_prompts_and_stop_tokens_of_every_natural_kind(model):
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    expected = [answer.tokens for answer in generate(model, ids.tolist(), 5)]
    for prompts in (ids, ids.int(), ids.numpy(), list(ids), [tuple(ids[0]), iter(ids[1])]):
        assert [answer.tokens for answer in generate(model, prompts, 5)] == expected
    for one in (ids[0], ids[0].numpy(), [ids[0]]):
        assert [answer.tokens for answer in generate(model, one, 5)] == expected[:1]
    stop = expected[0][1]
    first = expected[0][: expected[0].index(stop) + 1]
    for stops in (stop, [stop], {stop}, torch.tensor(stop), torch.tensor([stop])):
        assert generate(model, ids[0], 5, stop_tokens=stops)[0].tokens == first


def test_arrays_of_texts_are_prompts_of_their_own(model):
    texts, letters = ["bcd", "efgh"], Letters()
    expected = [answer.tokens for answer in generate(model, texts, 5, tokenizer=letters)]
    for array in (np.array(texts), np.array(texts, dtype=object)):
        answers = generate(model, array, 5, tokenizer=letters)
        assert [answer.tokens for answer in answers] == expected


def test_a_sampling_can_be_made_where_an_implementation_is_forced():
    with aigc_fast.backend("triton"):
        assert Sampling(temperature=0.7, seed=1).temperature == 0.7


def test_an_engine_cancels_only_its_own_requests(model):
    engine, other = Engine(model), Engine(model)
    request = other.add([1], 2)
    with pytest.raises(ValueError, match="request is another engine's"):
        engine.cancel(request)
    with pytest.raises(TypeError, match="request must be a Request, got NoneType"):
        engine.cancel(None)
    assert request.finish_reason is None and len(run(other)) == 2


@pytest.mark.parametrize("name", ["num_pages", "page_size", "max_batch_size", "prefill_chunk"])
def test_sizes_must_be_positive(model, name):
    with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
        Engine(model, **{name: 0})


def test_what_the_pages_never_hold_is_refused(model):
    engine = Engine(model, num_pages=2, page_size=4)
    engine.add([1, 2, 3], 6)
    with pytest.raises(ValueError, match="the engine's pages hold 8"):
        engine.add([1, 2, 3], 7)
    assert len(run(engine)) == 6
    assert TINY.max_position_embeddings == 64


def test_threads(model):
    """Some add and cancel, some step."""
    prompts = [[i % 17, 3 * i % 17, 5] for i in range(24)]
    want = [generate(model, [prompt], 12)[0].tokens for prompt in prompts]
    engine = Engine(model, max_batch_size=4)
    requests, added, errors = [None] * len(prompts), threading.Event(), []

    def add(first):
        for i in range(first, len(prompts), 3):
            requests[i] = engine.add(prompts[i], 12)
            if i % 6 == 0:
                engine.cancel(requests[i])

    def step():
        try:
            while not (added.is_set() and engine.idle):
                engine.step()
        except Exception as error:
            errors.append(error)

    adders, steppers = (
        [threading.Thread(target=run, args=args) for args in given]
        for run, given in ((add, [(0,), (1,), (2,)]), (step, [(), ()]))
    )
    for thread in adders + steppers:
        thread.start()
    for thread in adders:
        thread.join()
    added.set()
    for thread in steppers:
        thread.join()
    assert not errors and engine.pool.available == engine.pool.num_pages
    for i, request in enumerate(requests):
        assert request.tokens == want[i][: len(request.tokens)]
        assert i % 6 == 0 or request.finish_reason == "length"
