"""The next token of each sequence, drawn from its logits."""

import math

import torch
from torch import Tensor

from aigc_fast.ops import _gumbel
from aigc_fast.ops._checks import can_look, check_device, check_tensor
from aigc_fast.ops._registry import define

#: parameter: (least, greatest), in the order of the schema
LIMITS = {
    "temperature": (0.0, math.inf),
    "top_k": (0.0, math.inf),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "typical_p": (0.0, 1.0),
    "repetition_penalty": (1e-6, 1e6),
    "presence_penalty": (-1e6, 1e6),
    "frequency_penalty": (-1e6, 1e6),
}


def sample_tokens(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    typical_p: float | Tensor = 1.0,
    repetition_penalty: float | Tensor = 1.0,
    presence_penalty: float | Tensor = 0.0,
    frequency_penalty: float | Tensor = 0.0,
    token_counts: Tensor | None = None,
    allowed: Tensor | None = None,
    seeds: int | Tensor | None = None,
    steps: int | Tensor = 0,
) -> tuple[Tensor, Tensor]:
    """Draws one token a row: penalties, temperature, top-k, top-p, min-p, typical-p, then a Gumbel
    maximum.

    logits:       (batch, vocab), vocab from 1 to 2^22, float64/32/16 or bfloat16; rows may lie any
                  stride apart. All are taken as float32. -inf is a probability of zero.
    temperature:  the logits are divided by it; 0 takes the likeliest token.
    top_k:        only the k largest logits survive; 0 for all.
    top_p:        of these, the smallest set of the likeliest whose probabilities reach top_p.
    min_p:        of these, those at least min_p times as likely as the likeliest.
    typical_p:    of these, the tokens whose log-probability is nearest to its mean, which is the
                  negative entropy: the smallest set whose probabilities reach typical_p, and those
                  that are as near as its last one. (All of this among what survives so far.)
    repetition_penalty: positive logits of tokens with a count other than 0 are divided by it,
                  negative ones multiplied.
    presence_penalty, frequency_penalty: subtracted from logits of tokens with a count above 0, the
                  former once, the latter times the count.
    token_counts: int32 (batch, vocab), how often each token was generated; -1 marks a token that
                  only the prompt has. None: no penalties.
    allowed:      bool (batch, vocab), or int32 (batch, ceil(vocab / 32)) with token t as bit t % 32
                  of word t // 32; other tokens are never drawn.
    seeds, steps: int64 (batch,), or one int for all rows. A row's noise depends on its seed, its
                  step and the token's number alone: count steps up from token to token, and give
                  sequences that must differ different seeds. None: seeds are drawn from torch's
                  own generator.

    Temperature, filters and penalties are each a number or a (batch,) tensor, taken as float32.

    Returns (tokens, logprobs), int64 and float32 (batch,): logprobs is log_softmax of the logits as
    they came, before mask, penalties and filters. Where logits tie, lower token numbers come first:
    exactly k tokens survive top_k, and top_k=1 or temperature=0 is argmax. Every step is on
    integers or correctly rounded fp32, and sums are of integers (`_gumbel.py` defines them): a seed
    and step give the same token and logprob, to the last bit, for any batch, position, thread count
    and implementation.

    Raises TypeError or ValueError for wrong arguments, and on the CPU for a row that has NaN or
    +inf or no allowed finite logit. On a GPU such a row's token is -1 and its logprob NaN, because
    looking would make the CPU wait. RuntimeError if a gradient is asked for.

    Sorts nothing of the vocabulary's size but in the reference. Bytes that must move: the logits,
    twice (the log-probability needs the largest first).

    Source: the order of transformers' logits processors and its definitions of each, with vLLM's
    distinction of prompt and output tokens; Gumbel-max with Philox4x32-10 (Salmon et al. 2011);
    typical sampling of Meister et al. 2022 (arXiv:2202.00666).
    """
    if logits.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("sample_tokens has no derivative: call it under torch.no_grad()")
    values = (
        temperature, top_k, top_p, min_p, typical_p,
        repetition_penalty, presence_penalty, frequency_penalty,
    )  # fmt: skip
    if isinstance(top_k, float):
        raise TypeError("top_k must be an int or a torch.Tensor, got float")
    per_row = any(isinstance(v, Tensor) for v in values)
    return _sample_tokens(
        logits,
        [] if per_row else [float(v) for v in values],
        _per_row(logits, values) if per_row else None,
        token_counts,
        allowed,
        _random(logits) if seeds is None else _integers("seeds", logits, seeds),
        _integers("steps", logits, steps),
    )


def _per_row(logits: Tensor, values: tuple) -> Tensor:
    """The parameters as float32 (batch, 8)."""
    columns = []
    for name, value in zip(LIMITS, values, strict=True):
        if isinstance(value, Tensor):
            if tuple(value.shape) != tuple(logits.shape[:1]):
                shape = tuple(logits.shape[:1])
                raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
        else:
            value = torch.full(logits.shape[:1], float(value), device=logits.device)
        columns.append(value.float())
    return torch.stack(columns, -1)


def _random(logits: Tensor) -> Tensor:
    return torch.randint(2**63 - 1, logits.shape[:1], device=logits.device)


def _integers(name: str, logits: Tensor, value: int | Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if value is None or isinstance(value, float):  # torch would cut its digits off
        raise TypeError(f"{name} must be an int or a torch.Tensor, got {value}")
    return torch.full(logits.shape[:1], value, dtype=torch.int64, device=logits.device)


def _reference(
    logits: Tensor, settings: list[float], rows: Tensor | None, token_counts: Tensor | None,
    allowed: Tensor | None, seeds: Tensor, steps: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    raw = logits.float() + 0.0  # -0 becomes 0: they tie
    if rows is None:
        rows = torch.tensor([settings], dtype=torch.float32, device=logits.device)
    else:
        _check_values(rows)
    temperature, top_k, top_p, min_p, typical_p, repetition, presence, frequency = rows.split(1, 1)
    x = raw
    if allowed is not None:
        x = x.masked_fill(~_unpacked(allowed, x.shape[1]), -math.inf)
    if token_counts is not None:
        factor = torch.where(x > 0, 1.0 / repetition, repetition)
        x = torch.where(token_counts != 0, x * factor, x)
        x = x - token_counts.clamp(min=0).float() * frequency
        x = torch.where(token_counts > 0, x - presence, x)
    largest = x.amax(1, keepdim=True)
    good = (raw < math.inf).all(1, keepdim=True) & largest.isfinite()  # NaN is not below inf

    order = x.sort(dim=1, descending=True, stable=True)
    y = (order.values - largest) * (1.0 / temperature.clamp(min=1e-30))
    rank = torch.arange(x.shape[1], device=x.device)
    keep = ((rank < top_k) | (top_k == 0)) & (order.values > -math.inf)
    weight = torch.where(keep, _gumbel.weight(y), 0)
    before = weight.cumsum(1) - weight
    reach = (weight.sum(1, keepdim=True).float() * top_p).long().clamp(min=1)
    keep = keep & ((before < reach) | (top_p == 1))
    keep = keep & ((y >= _gumbel.log(min_p.clamp(min=1e-30))) | (min_p == 0))
    keep = keep & (_is_typical(y, keep, typical_p) | (typical_p == 1))
    keep = keep & ((rank == 0) | (temperature != 0))

    noise = _gumbel.gumbel(seeds[:, None], steps[:, None], order.indices)
    score = torch.where(keep, y + noise, -math.inf)
    best = keep & (score == score.amax(1, keepdim=True))
    token = torch.where(best, order.indices, x.shape[1]).amin(1, keepdim=True)
    token = torch.where(good, token, -1)
    _check_tokens(token)

    top = raw.amax(1, keepdim=True)
    rest = _gumbel.weight(raw - top).sum(1, keepdim=True) - _gumbel.ONE
    logprob = (raw.gather(1, token.clamp(min=0)) - top) - _gumbel.log1p(rest.float() * 2.0**-40)
    return token[:, 0].clone(), torch.where(good, logprob, math.nan)[:, 0].clone()


def _is_typical(y: Tensor, keep: Tensor, typical_p: Tensor) -> Tensor:
    """Log-probabilities are y less a constant, so that their distance from their mean is that of y
    from its own."""
    weight = torch.where(keep, _gumbel.weight(y), 0)
    mass = weight.sum(1, keepdim=True)
    mean = _gumbel.moment(weight, y).sum(1, keepdim=True).float()
    distance = (y - mean * _gumbel.reciprocal(mass.float())).abs()
    distance = torch.where(keep, distance, math.inf)
    nearest = distance.sort(dim=1, stable=True)
    reach = torch.minimum((mass.float() * typical_p).long(), mass).clamp(min=1)
    last = (weight.gather(1, nearest.indices).cumsum(1) < reach).sum(1, keepdim=True)
    return distance <= nearest.values.gather(1, last.clamp(max=y.shape[1] - 1))


def _unpacked(allowed: Tensor, vocab: int) -> Tensor:
    if allowed.dtype == torch.bool:
        return allowed
    bits = allowed[..., None] >> torch.arange(32, dtype=torch.int32, device=allowed.device)
    return (bits & 1).bool().flatten(1)[:, :vocab]


def _check_values(rows: Tensor) -> None:
    if not can_look(rows):
        return
    for row, values in enumerate(rows.tolist()):
        check_settings(values, f" in row {row}")


def check_settings(values: list[float], where: str = "") -> None:
    """ValueError for the first of the parameters, in the order of LIMITS, that is out of range."""
    for (name, (least, greatest)), value in zip(LIMITS.items(), values, strict=True):
        if not (least <= value <= greatest and math.isfinite(value)):
            raise ValueError(f"{name} must be from {least:g} to {greatest:g}, got {value:g}{where}")


def _check_tokens(tokens: Tensor) -> None:
    if can_look(tokens) and (tokens < 0).any():
        row = int((tokens.flatten() < 0).nonzero()[0])
        raise ValueError(
            "logits must have no NaN or +inf and at least one allowed finite value in each row, "
            f"row {row} has not"
        )


def _check(
    logits: Tensor, settings: list[float], rows: Tensor | None, token_counts: Tensor | None,
    allowed: Tensor | None, seeds: Tensor, steps: Tensor,
) -> None:  # fmt: skip
    check_tensor("logits", logits, ndim=2)
    batch, vocab = logits.shape
    if not 1 <= vocab <= 2**22:
        raise ValueError(f"logits must have from 1 to {2**22} columns, got {vocab}")
    if rows is None:
        check_settings(settings)
    else:
        check_tensor("rows", rows, dtypes=(torch.float32,), shape=(batch, len(LIMITS)))
    for name, numbers in (("seeds", seeds), ("steps", steps)):
        check_tensor(name, numbers, dtypes=(torch.int64,), shape=(batch,))
    if token_counts is not None:
        check_tensor("token_counts", token_counts, dtypes=(torch.int32,), shape=logits.shape)
    if allowed is not None:
        check_tensor("allowed", allowed, dtypes=(torch.bool, torch.int32))
        packed = allowed.dtype == torch.int32
        shape = (batch, (vocab + 31) // 32 if packed else vocab)
        check_tensor("allowed", allowed, dtypes=(allowed.dtype,), shape=shape)
    named = {"per-row parameters": rows, "token_counts": token_counts, "allowed": allowed}
    for name, tensor in (named | {"seeds": seeds, "steps": steps}).items():
        check_device(name, tensor, ("logits", logits))


_sample_tokens = define(
    "sample_tokens(Tensor logits, float[] settings, Tensor? rows, Tensor? token_counts,"
    " Tensor? allowed, Tensor seeds, Tensor steps) -> (Tensor, Tensor)",
    _reference,
    _check,
    stem="sampling",
)
