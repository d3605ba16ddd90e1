import torch
from torch import Tensor

from aigc_fast import ops
from tests.op_samples.sample import OpSamples, Refusal, Sample, rand


def _call(name: str, batch: int, vocab: int, scale: float = 3.0, **kwargs: object) -> Sample:
    numbers = {"seeds": torch.arange(batch) * 7919 + 2**40, "steps": torch.arange(batch) % 3}
    return Sample(name, (rand(batch, vocab, scale=scale),), numbers | kwargs)


def _counts(batch: int, vocab: int) -> Tensor:
    """Half of the tokens never, some in the prompt alone, some up to three times."""
    drawn = torch.randint(-4, 4, (batch, vocab), generator=torch.Generator().manual_seed(1))
    return torch.where(drawn < -1, 0, drawn).int()


def _allowed(batch: int, vocab: int) -> Tensor:
    return torch.rand(batch, vocab, generator=torch.Generator().manual_seed(2)) < 0.3


def _packed(batch: int, vocab: int) -> Tensor:
    words = (batch, (vocab + 31) // 32)
    generator = torch.Generator().manual_seed(3)
    return torch.randint(-(2**31), 2**31, words, generator=generator).int()


PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2}


def _samples() -> list[Sample]:
    per_row = {
        "temperature": torch.tensor([1.0, 0.0, 0.7, 2.0, 1e-3, 1.5]).double(),
        "top_k": torch.tensor([0, 0, 20, 1, 5, 1000]),
        "top_p": torch.tensor([1.0, 0.5, 0.9, 1.0, 0.0, 0.95]).double(),
        "min_p": torch.tensor([0.0, 0.1, 0.05, 0.0, 0.0, 0.2]).double(),
        "typical_p": torch.tensor([1.0, 0.5, 0.9, 0.2, 0.0, 0.7]).double(),
        "repetition_penalty": torch.tensor([1.0, 1.3, 0.7, 1.1, 1.0, 2.0]).double(),
        "presence_penalty": torch.tensor([0.0, 0.5, -0.5, 0.1, 0.0, 1.0]).double(),
        "frequency_penalty": torch.tensor([0.0, 0.2, -0.3, 0.1, 0.0, 0.5]).double(),
    }
    ties = Sample("ties", (rand(2, 300).round(),), {"top_k": 50, "top_p": 0.7, "seeds": 1})
    holes = _call("holes", 2, 1000, top_k=30)
    holes.args[0][:, ::3] = -torch.inf
    return [
        _call("top_k_top_p", 2, 1025, top_k=50, top_p=0.9, temperature=0.8),
        _call("plain", 2, 127),
        _call("top_k", 2, 1000, top_k=40),
        _call("large_top_k", 2, 1000, top_k=700, temperature=3.0),
        _call("top_p", 2, 1000, top_p=0.8),
        _call("min_p", 2, 1000, min_p=0.05),
        _call("all_filters", 2, 500, top_k=100, top_p=0.95, min_p=0.01),
        _call("typical_p", 2, 1000, typical_p=0.6),
        _call("typical_p_none", 2, 300, typical_p=0.0),
        _call("typical_p_nearly_all", 2, 300, typical_p=0.9999999, temperature=5.0),
        _call(
            "typical_and_all",
            2,
            500,
            top_k=100,
            top_p=0.95,
            min_p=0.01,
            typical_p=0.5,
            temperature=1.5,
        ),
        _call("typical_top_p", 2, 1000, typical_p=0.3, top_p=0.9),
        _call("typical_peaked", 2, 600, scale=1e4, typical_p=0.9),
        _call("typical_flat", 2, 600, scale=0.0, typical_p=0.5),
        _call("typical_many", 2, 128256, typical_p=0.9),
        _call("greedy", 2, 500, temperature=0.0),
        _call("penalties", 2, 200, token_counts=_counts(2, 200), **PENALTIES),
        _call("allowed", 2, 200, allowed=_allowed(2, 200), top_p=0.9),
        _call("packed", 2, 77, allowed=_packed(2, 77), top_k=9),
        _call("per_row", 6, 300, token_counts=_counts(6, 300), **per_row),
        ties,
        holes,
        _call("flat", 2, 600, scale=0.0, top_p=0.5),
        _call("peaked", 2, 600, scale=1e4, top_p=0.9),
        _call("one", 2, 1, top_k=3, top_p=0.5),
        _call("two", 2, 2, top_p=0.5, min_p=0.5),
        _call("seventeen", 2, 17, min_p=0.1),
        _call("empty", 0, 5),
        _call("negative_seed", 2, 65, seeds=-1, steps=-1),
        _call("words", 2, 32000, top_k=50, top_p=0.9),
        _call("many", 2, 128256, top_p=0.95),
        _call("many_plain", 1, 128256),
    ]


def _refusals() -> list[Refusal]:
    x = rand(2, 5)

    def value(name: str, match: str, *args: object, **kwargs: object) -> Refusal:
        return Refusal(name, args or (x,), ValueError, match, kwargs)

    return [
        Refusal("dtype", (x.int(),), TypeError, "logits must be float64"),
        value("one_dimension", "logits must have 2 dimensions", rand(5)),
        value("no_tokens", "logits must have from 1 to", rand(3, 0)),
        value("temperature", "temperature must be from 0 to inf, got -1", temperature=-1.0),
        value("top_k", "top_k must be from 0 to inf, got -1", top_k=-1),
        value("top_p", "top_p must be from 0 to 1, got 1.5", top_p=1.5),
        value("min_p", "min_p must be from 0 to 1, got nan", min_p=float("nan")),
        value("typical_p", "typical_p must be from 0 to 1, got 2", typical_p=2.0),
        value("repetition", "repetition_penalty must be from 1e-06", repetition_penalty=0.0),
        value("rows", r"top_p must have shape \(2,\)", top_p=torch.ones(3)),
        value("seeds", r"seeds must have shape \(2,\)", seeds=torch.zeros(3).long()),
        Refusal("steps", (x,), TypeError, "steps must be int64", {"steps": torch.zeros(2)}),
        Refusal("counts", (x,), TypeError, "token_counts must be int32", {"token_counts": x}),
        value("allowed", r"allowed must have shape \(2, 5\)", allowed=torch.ones(2, 4).bool()),
        value("packed", r"allowed must have shape \(2, 1\)", allowed=torch.ones(2, 5).int()),
    ]


def large(batch: int = 8, vocab: int = 128256, **kwargs: object) -> Sample:
    kind = "_".join(kwargs) or "plain"
    return _call(f"{batch}x{vocab}_{kind}", batch, vocab, **kwargs)


OPS = {
    "sample_tokens": OpSamples(
        ops.sample_tokens,
        _samples,
        _refusals,
        large=lambda: [
            large(top_k=50, top_p=0.9),
            large(1, top_k=50, top_p=0.9),
            large(1, 32000, top_k=50, top_p=0.9),
            large(),
            large(top_k=50),
            large(top_p=0.9),
            large(min_p=0.05),
            large(temperature=0.0),
        ],
        derivatives=0,
    ),
}
