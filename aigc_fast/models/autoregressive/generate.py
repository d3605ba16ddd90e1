"""Prompts in, text or tokens out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .decoder_lm import DecoderLM
from .engine import Engine
from .request import Request, Update
from .sampling import GREEDY, Sampling

if TYPE_CHECKING:
    from aigc_fast.io import TextTokenizer

_BATCH = 32
_PAGE_SIZE = 16


def generate(
    model: DecoderLM,
    prompts: Iterable[str | Sequence[int]],
    max_new_tokens: int,
    *,
    tokenizer: TextTokenizer | None = None,
    sampling: Sampling = GREEDY,
    cache_dtype: torch.dtype | None = None,
    cache_scales: Tensor | None = None,
    cuda_graph: bool = False,
    **options: Any,
) -> list[Request]:
    """The answers to some prompts, in their order; arguments as for `stream`.

    >>> [answer] = generate(model, ["Once upon a time"], 50, tokenizer=tokenizer)
    >>> answer.text, answer.tokens, answer.logprobs, answer.finish_reason
    """
    engine, requests = _prepare(
        model, prompts, max_new_tokens, tokenizer, sampling, options,
        cache_dtype=cache_dtype, cache_scales=cache_scales, cuda_graph=cuda_graph,
    )  # fmt: skip
    while not engine.idle:
        engine.step()
    return requests


def stream(
    model: DecoderLM,
    prompts: Iterable[str | Sequence[int]],
    max_new_tokens: int,
    *,
    tokenizer: TextTokenizer | None = None,
    sampling: Sampling = GREEDY,
    cache_dtype: torch.dtype | None = None,
    cache_scales: Tensor | None = None,
    cuda_graph: bool = False,
    **options: Any,
) -> Iterator[Update]:
    """Yields what comes for each prompt as it comes. Closing the iterator ends all of it.

    Args:
        prompts: one text, which needs a tokenizer, or list of token ids for each; of any lengths,
            none is padded.
        max_new_tokens: how many tokens to generate at most.
        sampling: how a token is chosen; prompt i draws with seed + i.
        cache_dtype, cache_scales, cuda_graph: as for `Engine`.
        options: stop_tokens, stop_strings and draft_tokens, as for `Engine.add`.

    Raises:
        TypeError, ValueError: at once, naming the argument at fault.
    """
    engine, _ = _prepare(
        model, prompts, max_new_tokens, tokenizer, sampling, options,
        cache_dtype=cache_dtype, cache_scales=cache_scales, cuda_graph=cuda_graph,
    )  # fmt: skip
    return _updates(engine)


def _updates(engine: Engine) -> Iterator[Update]:
    while not engine.idle:
        yield from engine.step()


def _prepare(
    model: DecoderLM,
    prompts: Iterable[str | Sequence[int]],
    max_new_tokens: int,
    tokenizer: TextTokenizer | None,
    sampling: Sampling,
    options: dict[str, Any],
    **of_engine: Any,
) -> tuple[Engine, list[Request]]:
    """An engine with just the memory these prompts need, and the prompts in it."""
    if isinstance(prompts, str):
        raise TypeError("prompts must be a list of prompts, got one text")
    prompts = [
        tokenizer.encode(prompt) if tokenizer and isinstance(prompt, str) else prompt
        for prompt in prompts
    ]
    if not prompts:
        raise ValueError("prompts must hold at least one prompt")
    room = sorted(len(prompt) + max_new_tokens for prompt in prompts if hasattr(prompt, "__len__"))
    pages = sum(-(-tokens // _PAGE_SIZE) for tokens in room[-_BATCH:])
    engine = Engine(
        model,
        tokenizer,
        num_pages=max(1, pages),
        page_size=_PAGE_SIZE,
        max_batch_size=min(len(prompts), _BATCH),
        **of_engine,
    )
    requests = []
    for i, prompt in enumerate(prompts):
        seeded = sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + i)
        requests.append(engine.add(prompt, max_new_tokens, sampling=seeded, **options))
    return engine, requests
