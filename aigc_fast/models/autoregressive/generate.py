"""Generation, token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aigc_fast import ops

from .cache import KVCache
from .decoder_lm import DecoderLM, check_token_ids


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; see `ops.sample_tokens` for the numbers.

    Attributes:
        temperature: 0 takes the most likely token.
        repetition_penalty: also on the tokens of the prompt; the other two only on new ones.
        seed: sequence i of a batch draws with seed + i, whatever else is in the batch; None draws
            the seeds from torch's generator.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None

    @property
    def has_penalties(self) -> bool:
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1.0, 0.0, 0.0)


GREEDY = Sampling()


def generate(
    model: DecoderLM,
    token_ids: Tensor | Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    stop_tokens: Sequence[int] = (),
    cache: KVCache | None = None,
) -> Tensor:
    """The continuation of every prompt; arguments as for `stream_tokens`.

    Returns:
        int64 (batch, new tokens), at most `max_new_tokens` of them, prompts not included.
    """
    stream = stream_tokens(
        model, token_ids, max_new_tokens, sampling=sampling, stop_tokens=stop_tokens, cache=cache
    )
    return torch.stack(list(stream), dim=1)


def stream_tokens(
    model: DecoderLM,
    token_ids: Tensor | Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    stop_tokens: Sequence[int] = (),
    cache: KVCache | None = None,
) -> Iterator[Tensor]:
    """Yields int64 (batch,) after every step: the next token of each sequence.

    Args:
        token_ids: the prompts: an integer tensor (batch, seq), or one list of ids per sequence,
            of any lengths.
        max_new_tokens: how many tokens to generate at most.
        sampling: how a token is chosen; by default the most likely one is.
        stop_tokens: ids that end a sequence. The stop token is yielded; a sequence that has
            ended goes on yielding the first of them until all have.
        cache: tokens to continue from, room for `max_new_tokens - 1` more than the prompt
            included; by default a new one of just that size.

    Raises:
        TypeError, ValueError: at once, naming the argument at fault.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be positive, got {max_new_tokens}")
    device = model.norm.weight.device
    padded, padding = _pad(token_ids, device)
    check_token_ids(padded, model.config)
    for token in stop_tokens:
        if not 0 <= token < model.config.vocab_size:
            raise ValueError(f"stop_tokens must lie in [0, {model.config.vocab_size}), got {token}")

    batch, seq = padded.shape
    room = seq + max_new_tokens - 1
    limit = model.config.max_position_embeddings
    if cache is not None:
        cache.check_room(batch, room)
    elif room > limit:
        raise ValueError(
            f"token_ids of length {seq} and max_new_tokens = {max_new_tokens} need {room} "
            f"positions, max_position_embeddings is {limit}"
        )
    else:
        cache = model.new_cache(batch, room)
    stop = torch.tensor(list(stop_tokens), dtype=torch.int64, device=device)
    chooser = _Chooser(model, sampling, padded, padding)
    return _stream(model, padded, padding, max_new_tokens, stop, cache, chooser)


class _Chooser:
    """Draws the tokens of a batch, and counts them where there are penalties."""

    def __init__(
        self, model: DecoderLM, sampling: Sampling, token_ids: Tensor, padding: Tensor
    ) -> None:
        batch, seq = token_ids.shape
        device = token_ids.device
        self.sampling, self.step = sampling, 0
        if sampling.seed is None:
            self.seeds = torch.randint(2**63 - 1, (batch,), device=device)
        else:
            self.seeds = torch.arange(batch, device=device) + sampling.seed
        self.counts: Tensor | None = None
        if sampling.has_penalties:
            shape = (batch, model.config.vocab_size + 1)
            counts = torch.zeros(shape, dtype=torch.int32, device=device)
            # -1 marks what only the prompt has; padding goes to a column of its own.
            is_padding = torch.arange(seq, device=device) >= seq - padding[:, None]
            counts.scatter_(1, token_ids.long().masked_fill(is_padding, shape[1] - 1), -1)
            self.counts = counts[:, :-1].contiguous()

    def __call__(self, logits: Tensor) -> Tensor:
        s = self.sampling
        tokens, _ = ops.sample_tokens(
            logits,
            temperature=s.temperature,
            top_k=s.top_k,
            top_p=s.top_p,
            min_p=s.min_p,
            repetition_penalty=s.repetition_penalty,
            presence_penalty=s.presence_penalty,
            frequency_penalty=s.frequency_penalty,
            token_counts=self.counts,
            seeds=self.seeds,
            steps=self.step,
        )
        self.step += 1
        if self.counts is not None:
            at = tokens[:, None]
            self.counts.scatter_(1, at, self.counts.gather(1, at).clamp_(min=0) + 1)
        return tokens


# As a decorator, so that the mode holds inside the steps and not in the code that iterates.
@torch.inference_mode()
def _stream(
    model: DecoderLM,
    token_ids: Tensor,
    padding: Tensor,
    max_new_tokens: int,
    stop: Tensor,
    cache: KVCache,
    choose: _Chooser,
) -> Iterator[Tensor]:
    batch, seq = token_ids.shape
    rows = torch.arange(batch, device=token_ids.device)
    hidden = model.hidden_states(token_ids, cache)[rows, seq - 1 - padding]
    cache.lengths.sub_(padding)
    ended = torch.zeros(batch, dtype=torch.bool, device=token_ids.device)
    for remaining in range(max_new_tokens - 1, -1, -1):
        next_tokens = choose(model.logits(hidden))
        if stop.numel():
            next_tokens = torch.where(ended, stop[0], next_tokens)
            ended |= torch.isin(next_tokens, stop)
        yield next_tokens
        if remaining == 0 or (stop.numel() and bool(ended.all())):
            return
        hidden = model.hidden_states(next_tokens[:, None], cache)[:, 0]


def _pad(
    token_ids: Tensor | Sequence[Sequence[int]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """The prompts as (batch, seq), padded on the right, and the int32 padding of each.

    On the right a causal mask hides the padding, and the cache overwrites it.
    """
    if isinstance(token_ids, Tensor):
        return token_ids.to(device), torch.zeros(
            token_ids.shape[:1], dtype=torch.int32, device=device
        )
    try:
        rows = [torch.tensor(list(row), device=device) for row in token_ids]
    except TypeError:
        raise TypeError("token_ids must be a tensor or one list of ids per sequence") from None
    if not rows or not all(len(row) for row in rows):
        raise ValueError("token_ids must hold at least one prompt, and none may be empty")
    for row in rows:
        if row.dtype != torch.int64:
            raise TypeError(f"token_ids must hold integers, got {row.dtype}")
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    padding = torch.tensor([padded.shape[1] - len(row) for row in rows], dtype=torch.int32)
    return padded, padding.to(device)
