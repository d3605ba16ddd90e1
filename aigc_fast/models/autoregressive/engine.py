"""Many requests through one model, each joining and leaving as it comes and ends."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Sequence, Set
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aigc_fast import ops
from aigc_fast._graphs import Replay, check_graph
from aigc_fast.io.token_ids import ids_of

from .arguments import check_class, count
from .cache import CACHE_DTYPES, KVCache, allocate
from .cache_scales import calibrate_cache, check_scales
from .decoder_lm import DecoderLM
from .pages import PagePool
from .request import FinishReason, Request, StoppedText, Update
from .sampling import GREEDY, BatchSampler, Choice, Sampling

if TYPE_CHECKING:
    from aigc_fast.io import TextTokenizer


class Engine:
    """Generates for many requests at once, with keys and values in pages that they share.

    Every step computes one token of each running request, then a piece of the prompt of the one
    that is next. Prompts that begin alike share the pages of what is alike, also with requests
    that have ended; the pages of these are the first to go when memory is needed. A request waits
    until it can have all the pages it may need, so that a running one never fails for memory.

    >>> engine = Engine(model, tokenizer)
    >>> request = engine.add("Once upon a time", max_new_tokens=50, stop_strings=["\\n"])
    >>> while not engine.idle:
    ...     for update in engine.step():
    ...         print(update.text, end="")

    Attributes:
        model, tokenizer: as given.
        pool: who holds which page.
    """

    def __init__(
        self,
        model: DecoderLM,
        tokenizer: TextTokenizer | None = None,
        *,
        num_pages: int = 2048,
        page_size: int = 16,
        max_batch_size: int = 32,
        prefill_chunk: int = 512,
        cache_dtype: torch.dtype | None = None,
        cache_scales: Tensor | None = None,
        cuda_graph: bool = False,
    ) -> None:
        """
        Args:
            tokenizer: for prompts given as text, for the text of updates and for stop strings.
            num_pages, page_size: the memory for keys and values, num_pages * page_size tokens.
            max_batch_size: how many requests run at once.
            prefill_chunk: tokens of a prompt computed at once. Others wait as long for a token.
            cache_dtype: of keys and values: the model's, or a narrower one: float16 beside float32
                takes half the memory, and half the time that attention takes to read it; int8,
                float8_e4m3fn and float8_e5m2 a quarter: 2 * num_layers * num_kv_heads * head_dim
                bytes a token, 11.25 KiB instead of 45 for SmolLM2-135M. These round each number,
                int8 to 1 / 84 of the largest in its head, e4m3 by 1 / 16 and e5m2 by 1 / 8 of
                itself at most.
            cache_scales: what the numbers of each head of caches of one byte are to be multiplied
                by, as `calibrate_cache` gives them. None is 1 for fp8, as in vLLM, and for int8
                what `calibrate_cache` finds without a text.
            cuda_graph: whether a decoding step, sampling included, is one CUDA graph for each
                number of running requests; nothing then waits for the device but the reading of
                the tokens. A step of a model with dynamic rotary scaling past its original length,
                whose angles change with the length, is always run without. That the step can be
                recorded is tested on the CPU, by replaying the operators that it calls; the
                recording itself has not run on a GPU yet.

        Raises:
            TypeError, ValueError: naming the argument at fault: a number is not positive, scales
                do not go with cache_dtype, cuda_graph is True for a model on the CPU.
            RuntimeError: from `step`, where the device cannot record the model's decoding step.
        """
        check_class("model", model, DecoderLM)
        check_tokenizer(tokenizer)
        self.model, self.tokenizer = model, tokenizer
        self.pool = PagePool(num_pages, page_size)
        self.max_batch_size = count("max_batch_size", max_batch_size)
        self.prefill_chunk = count("prefill_chunk", prefill_chunk)
        weight = model.norm.weight
        self._device = weight.device
        if cache_dtype not in (None, *CACHE_DTYPES):
            raise TypeError(f"cache_dtype must be one of {CACHE_DTYPES}, got {cache_dtype}")
        dtype = cache_dtype or weight.dtype
        if dtype == torch.int8 and cache_scales is None:
            cache_scales = calibrate_cache(model, dtype)
        check_scales("cache_scales", cache_scales, model.config, dtype)
        self._scales = None if cache_scales is None else cache_scales.to(weight.device)
        self._memory = allocate(
            model.config, self.pool.num_pages, self.pool.page_size, dtype, weight.device
        )
        self._graph: Replay | None = None
        check_graph(cuda_graph, weight.device)
        if cuda_graph:
            step = functools.partial(_decoding_step, model, self._memory, self._scales)
            self._graph = Replay(step, weight.device)
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._batch: _Batch | None = None

    @property
    def max_length(self) -> int:
        """Most keys and values a request may need: what the pages hold, or the model knows."""
        room = self.pool.num_pages * self.pool.page_size
        return min(room, self.model.config.max_position_embeddings)

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return not self._waiting and not self._running

    def add(
        self,
        prompt: str | Sequence[int] | Tensor,
        max_new_tokens: int,
        *,
        sampling: Sampling = GREEDY,
        stop_tokens: Iterable[int] | int = (),
        stop_strings: Sequence[str] = (),
        draft_tokens: int = 0,
    ) -> Request:
        """Queues a request; the steps to come work on it.

        Args:
            prompt: a text, or token ids: a list, or a tensor or array of one dimension.
            max_new_tokens: how many tokens to generate at most.
            sampling: how a token is chosen; by default the most likely one is.
            stop_tokens: ids, or one id, that end the answer, the last one being such.
            stop_strings: texts that end the answer, which goes up to before the first of them.
            draft_tokens: guess so many tokens at most from what followed the newest ones earlier in
                the text, and check them in one step. The tokens are the same as without, with
                sampling too; the time is less where text repeats itself. No guesses are made where
                there are penalties.

        Raises:
            TypeError, ValueError: naming the argument at fault.
        """
        config = self.model.config
        max_new_tokens = count("max_new_tokens", max_new_tokens)
        draft_tokens = count("draft_tokens", draft_tokens, least=0)
        check_class("sampling", sampling, Sampling)
        stops = _stop_tokens(stop_tokens)
        _check_ids("stop_tokens", stops, config.vocab_size)
        stop_strings = _stop_strings(stop_strings)
        if self.tokenizer is None and stop_strings:
            raise ValueError("stop_strings: there is no tokenizer")
        ids = prompt_ids(prompt, self.tokenizer)
        if not ids:
            raise ValueError("prompt must not be empty")
        _check_ids("prompt", ids, config.vocab_size)
        decoder = None if self.tokenizer is None else self.tokenizer.stream_decoder()
        request = Request(
            ids,
            max_new_tokens,
            Choice(sampling, ids, config.vocab_size, self._device),
            frozenset(stops),
            StoppedText(decoder, stop_strings),
            0 if sampling.has_penalties else draft_tokens,
        )
        if request.capacity > self.max_length:
            raise ValueError(
                f"prompt of length {len(ids)} and max_new_tokens = {max_new_tokens} need "
                f"{request.capacity} positions; the model knows {config.max_position_embeddings}, "
                f"the engine's pages hold {self.pool.num_pages * self.pool.page_size}"
            )
        self._waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request; what it has generated stays. Nothing happens if it has ended already."""
        check_class("request", request, Request)
        if request.finish_reason is None:
            if request not in self._running and request not in self._waiting:
                raise ValueError("request is another engine's")
            self._end(request, "cancelled")

    # As a decorator, so that the mode holds inside a step and not in the code around it.
    @torch.inference_mode()
    def step(self) -> list[Update]:
        """The next token of every running request, and a piece of the prompt of the next one.

        Raises:
            ValueError: the model's logits are not finite. The requests are as they were before.
        """
        running = list(self._running)
        # Nothing is accepted before all is computed.
        accept = self._decode() if running else list
        updates: list[Update] = []
        if self._waiting and len(running) < self.max_batch_size:
            updates = self._prefill(self._waiting[0])
        updates = accept() + updates
        for update in updates:
            if update.finish_reason:
                self._end(update.request, update.finish_reason)
        return updates

    def _prefill(self, request: Request) -> list[Update]:
        if request.held is None:
            request.held = self.pool.acquire(request.prompt, request.capacity)
            if request.held is None:
                return []
            request.computed = len(request.held.shared) * self.pool.page_size
        begin = request.computed
        end = min(len(request.prompt), begin + self.prefill_chunk)
        cache = KVCache(
            self._memory,
            torch.tensor([begin], dtype=torch.int32, device=self._device),
            used=begin,
            block_table=self._block_table([request]),
            scales=self._scales,
        )
        ids = torch.tensor([request.prompt[begin:end]], device=self._device)
        hidden = self.model.hidden_states(ids, cache)
        if end < len(request.prompt):
            request.computed = end
            return []
        sampler = BatchSampler([request.choice], self._device)
        tokens, logprobs = sampler(self.model.logits(hidden[:, -1]), [0])
        [token], [logprob] = _checked(tokens.tolist()), logprobs.tolist()
        request.computed = end
        self.pool.publish(request.held, request.prompt)
        sampler.count(0, token)
        self._waiting.popleft()
        self._running.append(request)
        self._batch = None
        return [request.accept([token], [logprob])]

    def _decode(self) -> Callable[[], list[Update]]:
        """One step of all running requests; a guessed token is a row of its own, at its place in
        the same pages. Returns what accepts the tokens."""
        if self._batch is None:
            self._batch = _Batch(self)
        running, sampler = list(self._running), self._batch.sampler
        drafts = [request.draft() for request in running]
        rows = [i for i, draft in enumerate(drafts) for _ in draft]
        lengths = [
            request.computed + i
            for request, draft in zip(running, drafts, strict=True)
            for i in range(len(draft))
        ]
        tokens, logprobs = self._batch.next_tokens([t for d in drafts for t in d], rows, lengths)

        def accept() -> list[Update]:
            updates, at = [], 0
            for row, (request, draft) in enumerate(zip(running, drafts, strict=True)):
                right = 1
                while right < len(draft) and tokens[at + right - 1] == draft[right]:
                    right += 1
                update = request.accept(tokens[at : at + right], logprobs[at : at + right])
                request.computed += len(update.tokens)
                for token in update.tokens:
                    sampler.count(row, token)
                updates.append(update)
                at += len(draft)
            return updates

        return accept

    def _block_table(self, requests: Sequence[Request]) -> Tensor:
        held = [request.held.ids for request in requests if request.held is not None]
        width = max(map(len, held))
        if self._graph is not None:  # few widths, since each has a graph of its own
            width = 1 << (width - 1).bit_length()
        table = [ids + [0] * (width - len(ids)) for ids in held]
        return torch.tensor(table, dtype=torch.int32, device=self._device)

    def _end(self, request: Request, reason: FinishReason) -> None:
        request.finish_reason = reason
        if request in self._running:
            self._running.remove(request)
            self._batch = None
        else:
            self._waiting.remove(request)
        if request.held is not None:
            self.pool.publish(request.held, request.known(request.computed))
            self.pool.release(request.held)
            request.held = None


class _Batch:
    """What the steps of the same requests share."""

    def __init__(self, engine: Engine) -> None:
        self._model, self._memory, self._device = engine.model, engine._memory, engine._device
        self._graph, self._scales = engine._graph, engine._scales
        self._block_table = engine._block_table(engine._running)
        self.sampler = BatchSampler([r.choice for r in engine._running], engine._device)

    def next_tokens(
        self, token_ids: list[int], rows: list[int], lengths: list[int]
    ) -> tuple[list[int], list[float]]:
        """What comes after each token, and the logarithm of its probability.

        Args:
            rows: the request of each token, in order.
            lengths: the tokens before it.
        """
        table = self._block_table
        if len(rows) != len(table):
            table = table[torch.tensor(rows, device=self._device)]
        scaling = self._model.config.rope_scaling
        if self._graph is not None and not (scaling and scaling.stretches(max(lengths) + 1)):
            numbers = torch.tensor([token_ids, lengths, self.sampler.steps(rows)])
            arguments = self.sampler.arguments(rows)
            (found,) = self._graph(numbers, table, tuple(arguments), *arguments.values())
            chosen, logprobs = found.tolist()
            return _checked([int(token) for token in chosen]), logprobs
        cache = KVCache(
            self._memory,
            torch.tensor(lengths, dtype=torch.int32, device=self._device),
            used=max(lengths),
            block_table=table,
            scales=self._scales,
        )
        ids = torch.tensor(token_ids, device=self._device)[:, None]
        hidden = self._model.hidden_states(ids, cache)[:, 0]
        tokens, logprobs = self.sampler(self._model.logits(hidden), rows)
        return _checked(tokens.tolist()), logprobs.tolist()


def _decoding_step(
    model: DecoderLM,
    memory: list[Tensor],
    scales: Tensor | None,
    numbers: Tensor,
    block_table: Tensor,
    names: tuple[str, ...],
    *arguments: Any,
) -> tuple[Tensor]:
    """`_Batch.next_tokens` of tensors alone, for a CUDA graph.

    Args:
        numbers: int64 (3, rows): the tokens, how many are before each, and the sampler's steps.
        names, arguments: of `ops.sample_tokens`.

    Returns:
        float64 (2, rows), tokens and log-probabilities, which hold both exactly: one reading.
    """
    ids, lengths, steps = numbers.unbind()
    # No number says here how much of the cache is used: the graph would keep it. There is room,
    # since a request has all its pages from the beginning.
    cache = KVCache(memory, lengths.int(), block_table=block_table, scales=scales)
    logits = model.logits(model.hidden_states(ids[:, None], cache)[:, 0])
    options = dict(zip(names, arguments, strict=True))
    tokens, logprobs = ops.sample_tokens(logits, steps=steps, **options)
    return (torch.stack([tokens.double(), logprobs.double()]),)


def _checked(tokens: list[int]) -> list[int]:
    if min(tokens) < 0:  # what a GPU gives, where the CPU's operator raises this itself
        raise ValueError(
            "logits must have no NaN or +inf and at least one finite value in each row"
        )
    return tokens


def check_tokenizer(tokenizer: object) -> None:
    """Raises TypeError unless it is None or has what the engine needs of a TextTokenizer."""
    if not (tokenizer is None or hasattr(tokenizer, "stream_decoder")):
        raise TypeError(f"tokenizer must be a TextTokenizer, got {type(tokenizer).__name__}")


def prompt_ids(prompt: Any, tokenizer: TextTokenizer | None) -> list[int]:
    """The token ids of a prompt."""
    if not isinstance(prompt, str):
        return ids_of("prompt", prompt)
    if tokenizer is None:
        raise ValueError("a prompt in text needs a tokenizer, but there is none")
    return tokenizer.encode(prompt)


def _stop_tokens(value: Any) -> list[int]:
    if isinstance(value, Set):
        value = list(value)
    one = isinstance(value, int) or getattr(value, "shape", None) == ()
    return ids_of("stop_tokens", [value] if one else value)


def _stop_strings(value: Any) -> list[str]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"stop_strings must be a list of strings, got {type(value).__name__}")
    strings = list(value)
    for string in strings:
        check_class("each of stop_strings", string, str)
    if not all(strings):
        raise ValueError("stop_strings must not hold an empty string")
    return strings


def _check_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ValueError(f"{name} must lie in [0, {vocab_size}), got {token}")
