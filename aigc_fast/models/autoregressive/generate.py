"""Prompts in, text or tokens out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aigc_fast.ops._checks import check_class

from .arguments import count
from .decoder_lm import DecoderLM
from .engine import Engine
from .prompts import check_tokenizer, prompt_ids
from .request import Request, Update
from .sampling import GREEDY, Sampling

if TYPE_CHECKING:
    from aigc_fast.io import TextTokenizer

_BATCH = 32
_PAGE_SIZE = 16
_OPTIONS = {"stop_tokens", "stop_strings", "draft_tokens"}

Prompts = Iterable[str | Sequence[int] | Tensor] | Tensor


def generate(
    model: DecoderLM,
    prompts: Prompts,
    max_new_tokens: int,
    *,
    tokenizer: TextTokenizer | None = None,
    sampling: Sampling = GREEDY,
    cache_dtype: torch.dtype | None = None,
    cache_scales: Tensor | None = None,
    cuda_graph: bool = False,
    **options: Any,
) -> list[Request]:
    """Answers prompts, and returns the finished requests in their order. Arguments as for `stream`.

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
    prompts: Prompts,
    max_new_tokens: int,
    *,
    tokenizer: TextTokenizer | None = None,
    sampling: Sampling = GREEDY,
    cache_dtype: torch.dtype | None = None,
    cache_scales: Tensor | None = None,
    cuda_graph: bool = False,
    **options: Any,
) -> Iterator[Update]:
    """Answers prompts, and yields an update whenever one of them gets tokens. Closing the iterator
    ends the generation.

    Args:
        prompts: a text, which needs a tokenizer, or a list of token ids for each prompt; they may
            have any lengths, nothing is padded. Or a tensor of ids: one prompt, or one in each row.
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
    prompts: Prompts,
    max_new_tokens: int,
    tokenizer: TextTokenizer | None,
    sampling: Sampling,
    options: dict[str, Any],
    **of_engine: Any,
) -> tuple[Engine, list[Request]]:
    """An engine with just the memory these prompts need, and the prompts in it."""
    check_class("model", model, DecoderLM)
    check_tokenizer(tokenizer)
    check_class("sampling", sampling, Sampling)
    max_new_tokens = count("max_new_tokens", max_new_tokens)
    if (unknown := set(options) - _OPTIONS) != set():
        raise TypeError(f"{min(unknown)} is no argument: those left are {sorted(_OPTIONS)}")
    found = _prompts(prompts, tokenizer)
    most = model.config.max_position_embeddings  # more is refused by `add`, before it is needed
    room = sorted(min(len(prompt) + max_new_tokens, most) for prompt in found)
    pages = sum(-(-tokens // _PAGE_SIZE) for tokens in room[-_BATCH:])
    engine = Engine(
        model,
        tokenizer,
        num_pages=pages,
        max_length=room[-1],  # by which LongRoPE chooses its frequencies
        page_size=_PAGE_SIZE,
        max_batch_size=min(len(found), _BATCH),
        **of_engine,
    )
    requests = []
    for i, prompt in enumerate(found):
        seeded = sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + i)
        requests.append(engine.add(prompt, max_new_tokens, sampling=seeded, **options))
    return engine, requests


def _prompts(prompts: Any, tokenizer: TextTokenizer | None) -> list[list[int]]:
    """The token ids of each prompt."""
    if isinstance(prompts, (str, bytes)):
        raise TypeError("prompts must be a list of prompts, got one text")
    if isinstance(prompts, Mapping) or not isinstance(prompts, Iterable):
        raise TypeError(f"prompts must be a list of prompts, got {type(prompts).__name__}")
    shape = getattr(prompts, "shape", None)
    if shape is not None and len(shape) < 2 and _holds_numbers(prompts):
        prompts = [prompts]
    found = [prompt_ids(prompt, tokenizer) for prompt in prompts]
    if not found:
        raise ValueError("prompts must hold at least one prompt")
    return found


def _holds_numbers(array: Any) -> bool:
    """Whether a tensor or array holds numbers, and not texts or lists."""
    return getattr(array.dtype, "kind", "i") in "biuf"
