"""One token for each of many requests, by a CUDA graph where the engine has one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aigc_fast import ops
from aigc_fast._graphs import Replay

from .cache import KVCache
from .decoder_lm import DecoderLM
from .sampling import BatchSampler, Choice


class Batch:
    """What the steps of the same requests share.

    memory, options: of the caches, as for KVCache: `scales` and `longest`.
    graph:          of `decoding_step`, where steps are to run in one.
    block_table:    the pages of each request.
    choices:        how each one's tokens are chosen.
    """

    def __init__(
        self,
        model: DecoderLM,
        memory: list[Tensor],
        options: dict[str, Any],
        graph: Replay | None,
        block_table: Tensor,
        choices: list[Choice],
    ) -> None:
        self._model, self._memory, self._options = model, memory, options
        self._graph, self._block_table, self._device = graph, block_table, block_table.device
        self.sampler = BatchSampler(choices, self._device)

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
            return checked_tokens([int(token) for token in chosen]), logprobs
        cache = KVCache(
            self._memory,
            torch.tensor(lengths, dtype=torch.int32, device=self._device),
            used=max(lengths),
            block_table=table,
            **self._options,
        )
        ids = torch.tensor(token_ids, device=self._device)[:, None]
        hidden = self._model.hidden_states(ids, cache)[:, 0]
        tokens, logprobs = self.sampler(self._model.logits(hidden), rows)
        return checked_tokens(tokens.tolist()), logprobs.tolist()


def decoding_step(
    model: DecoderLM,
    memory: list[Tensor],
    options: dict[str, Any],
    numbers: Tensor,
    block_table: Tensor,
    names: tuple[str, ...],
    *arguments: Any,
) -> tuple[Tensor]:
    """`Batch.next_tokens` of tensors alone, for a CUDA graph.

    Args:
        numbers: int64 (3, rows): the tokens, how many are before each, and the sampler's steps.
        names, arguments: of `ops.sample_tokens`.

    Returns:
        float64 (2, rows), tokens and log-probabilities, which hold both exactly: one reading.
    """
    ids, lengths, steps = numbers.unbind()
    # No number says here how much of the cache is used: the graph would keep it. There is room,
    # since a request has all its pages from the beginning.
    cache = KVCache(memory, lengths.int(), block_table=block_table, **options)
    logits = model.logits(model.hidden_states(ids[:, None], cache)[:, 0])
    how = dict(zip(names, arguments, strict=True))
    tokens, logprobs = ops.sample_tokens(logits, steps=steps, **how)
    return (torch.stack([tokens.double(), logprobs.double()]),)


def checked_tokens(tokens: list[int]) -> list[int]:
    """The same; ValueError for what the sampler gives where logits are no numbers."""
    if min(tokens) < 0:  # what a GPU gives, where the CPU's operator raises this itself
        raise ValueError(
            "logits must have no NaN or +inf and at least one finite value in each row"
        )
    return tokens
