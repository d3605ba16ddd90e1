"""Many requests through one model, each joining and leaving as it comes and ends."""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aigc_fast._graphs import Replay, check_graph
from aigc_fast.ops._checks import check_class

from .arguments import count
from .cache import CACHE_DTYPES, KVCache, allocate
from .cache_scales import calibrate_cache, check_scales
from .decoder_lm import DecoderLM
from .decoding import Batch, checked_tokens, decoding_step
from .pages import PagePool
from .prompts import check_known, check_tokenizer, prompt_ids, stop_texts, stop_token_ids
from .request import FinishReason, Request, StoppedText, Update
from .sampling import GREEDY, BatchSampler, Choice, Sampling

if TYPE_CHECKING:
    from aigc_fast.io import TextTokenizer


class Engine:
    """Generates for many requests at once, with keys and values in pages that they share.

    Every step computes one token of each running request, then a piece of the next request's
    prompt. Prompts with the same beginning share its pages, also with requests that have ended,
    whose pages are the first to be reused when memory is needed. A request waits until it can have
    all the pages it may need, so that a running one never fails for lack of memory. Of several
    threads one may step while others add and cancel: a step and a cancellation wait for each other.

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
        max_length: int | None = None,
        cache_dtype: torch.dtype | None = None,
        cache_scales: Tensor | None = None,
        cuda_graph: bool = False,
    ) -> None:
        """
        Args:
            tokenizer: for prompts given as text, for the text of updates and for stop strings.
            num_pages, page_size: the memory for keys and values, num_pages * page_size tokens.
            max_batch_size: how many requests run at once.
            prefill_chunk: tokens of a prompt computed in one step; other requests wait for it.
            max_length: the longest that a request may become, its last token not counted; None is
                what the pages hold. Above the original length of a model with LongRoPE (Phi-3) all
                requests use its long frequencies, because they share pages.
            cache_dtype: of keys and values; None is that of the model. Next to float32, float16
                takes half the memory, and half the time that attention takes to read it; int8,
                float8_e4m3fn and float8_e5m2 a quarter: 2 * num_layers * num_kv_heads * head_dim
                bytes a token, 11.25 KiB instead of 45 for SmolLM2-135M. These round each number,
                int8 to 1 / 84 of the largest in its head, e4m3 by at most 1 / 16 and e5m2 by at
                most 1 / 8 of itself.
            cache_scales: float32 (2 * num_layers, num_kv_heads), the factor on the numbers of each
                head of caches of one byte, as `calibrate_cache` gives them. None is 1 for float8,
                as in vLLM, and for int8 what `calibrate_cache` finds without a text.
            cuda_graph: whether a decoding step, sampling included, is one CUDA graph for each
                number of running requests. Then only reading the tokens waits for the device.
                With dynamic rotary scaling, steps beyond the original length run without, since
                their angles change with the length. That the step can be
                recorded is tested on the CPU, by replaying the operators that it calls; the
                recording itself has not run on a GPU yet.

        Raises:
            TypeError, ValueError: naming the argument at fault: a number is not positive, scales
                do not fit cache_dtype, cuda_graph is True for a model on the CPU.
            RuntimeError: from `step`, where the device cannot record the model's decoding step.
        """
        check_class("model", model, DecoderLM)
        check_tokenizer(tokenizer)
        self.model, self.tokenizer = model, tokenizer
        self.pool = PagePool(num_pages, page_size)
        self.max_batch_size = count("max_batch_size", max_batch_size)
        self.prefill_chunk = count("prefill_chunk", prefill_chunk)
        self._max_length = None if max_length is None else count("max_length", max_length)
        weight = model.norm.weight
        self._device = weight.device
        if cache_dtype not in (None, *CACHE_DTYPES):
            raise TypeError(f"cache_dtype must be one of {CACHE_DTYPES}, got {cache_dtype}")
        dtype = cache_dtype or weight.dtype
        if dtype == torch.int8 and cache_scales is None:
            cache_scales = calibrate_cache(model, dtype)
        check_scales("cache_scales", cache_scales, model.config, dtype)
        self._options: dict[str, Any] = {
            "scales": None if cache_scales is None else cache_scales.to(weight.device),
            "longest": self.max_length,
        }
        self._memory = allocate(
            model.config, self.pool.num_pages, self.pool.page_size, dtype, weight.device
        )
        self._graph: Replay | None = None
        check_graph(cuda_graph, weight.device)
        if cuda_graph:
            step = functools.partial(decoding_step, model, self._memory, self._options)
            self._graph = Replay(step, weight.device)
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._batch: Batch | None = None
        self._lock = threading.RLock()  # held while requests move

    @property
    def max_length(self) -> int:
        """Most keys and values that a request may need: the least of what the pages hold, what the
        model knows and the argument."""
        room = self.pool.num_pages * self.pool.page_size
        known = self.model.config.max_position_embeddings
        return min(room, known, self._max_length or known)

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
        """Queues a request for the next steps.

        Args:
            prompt: a text, or token ids: a list, or a tensor or array of one dimension.
            max_new_tokens: how many tokens to generate at most.
            sampling: how a token is chosen; by default the most likely one is.
            stop_tokens: ids, or one id, that end the answer, which includes them.
            stop_strings: texts that end the answer, which stops before them.
            draft_tokens: guess up to this many tokens from what followed the newest ones earlier in
                the text, and check them in one step. The tokens are the same as without guesses,
                with sampling too; it takes less time where text repeats itself. No guesses are
                made where there are penalties.

        Raises:
            TypeError, ValueError: naming the argument at fault.
        """
        config = self.model.config
        max_new_tokens = count("max_new_tokens", max_new_tokens)
        draft_tokens = count("draft_tokens", draft_tokens, least=0)
        check_class("sampling", sampling, Sampling)
        stops = stop_token_ids(stop_tokens)
        check_known("stop_tokens", stops, config.vocab_size)
        stop_strings = stop_texts(stop_strings)
        if self.tokenizer is None and stop_strings:
            raise ValueError("stop_strings: there is no tokenizer")
        ids = prompt_ids(prompt, self.tokenizer)
        if not ids:
            raise ValueError("prompt must not be empty")
        check_known("prompt", ids, config.vocab_size)
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
                + (f", its max_length is {self._max_length}" if self._max_length else "")
            )
        self._waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request, which keeps what it has generated; does nothing if it has ended already.

        Raises:
            ValueError: the request is another engine's.
        """
        check_class("request", request, Request)
        with self._lock:
            if request.finish_reason is None:
                if request not in self._running and request not in self._waiting:
                    raise ValueError("request is another engine's")
                self._end(request, "cancelled")

    # As a decorator, so that the mode holds inside a step and not in the code around it.
    @torch.inference_mode()
    def step(self) -> list[Update]:
        """The next token of every running request, and a piece of the prompt of the next one.

        Raises:
            ValueError: the model's logits are not finite. The requests stay as they were.
        """
        with self._lock:
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
            **self._options,
        )
        ids = torch.tensor([request.prompt[begin:end]], device=self._device)
        hidden = self.model.hidden_states(ids, cache)
        if end < len(request.prompt):
            request.computed = end
            return []
        sampler = BatchSampler([request.choice], self._device)
        tokens, logprobs = sampler(self.model.logits(hidden[:, -1]), [0])
        [token], [logprob] = checked_tokens(tokens.tolist()), logprobs.tolist()
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
            table, choices = self._block_table(self._running), [r.choice for r in self._running]
            self._batch = Batch(
                self.model, self._memory, self._options, self._graph, table, choices
            )
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
