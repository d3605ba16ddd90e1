"""What the table of samples does not say of sample_tokens."""

import math

import pytest
import torch
from torch import Tensor

import aigc_fast
from aigc_fast import ops
from aigc_fast.ops import _gumbel
from tests.op_samples import rand
from tests.ops.test_every_op import DEVICE


def draws(logits: Tensor, count: int, **kwargs: object) -> Tensor:
    """`count` tokens of one row of logits, each of another seed."""
    seeds = torch.arange(count) * 1_000_003 - 5
    return ops.sample_tokens(logits.expand(count, -1), seeds=seeds, **kwargs)[0]


def survivors(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    typical_p: float = 1.0,
) -> Tensor:
    """Probabilities of one row in float64 after the filters, by sorting after each of them."""
    x = logits.double() / temperature
    if top_k:
        order = x.sort(descending=True, stable=True).indices
        x[order[top_k:]] = -torch.inf
    if top_p < 1:
        p, order = x.softmax(-1).sort(descending=True, stable=True)
        x[order[p.cumsum(0) - p >= top_p]] = -torch.inf
    if min_p:
        p = x.softmax(-1)
        x[p < min_p * p.max()] = -torch.inf
    if typical_p < 1:
        p = x.softmax(-1)
        distance = (p.log() - torch.where(p > 0, p * p.log(), 0).sum()).abs()
        order = distance.sort(stable=True)
        last = (p[order.indices].cumsum(0) < typical_p).sum()
        x[distance > order.values[last] + 1e-6] = -torch.inf
    return x.softmax(-1)


# ---- the noise ------------------------------------------------------------------------------


def test_philox_gives_the_known_answers() -> None:
    # The vectors of Random123, the authors' own library.
    for words, key, expected in [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ]:
        found = _gumbel.philox(tuple(map(torch.tensor, words)), tuple(map(torch.tensor, key)))
        assert " ".join(f"{int(w):08x}" for w in found) == expected


def test_logarithm_and_exponential_are_those_of_mathematics() -> None:
    s = torch.logspace(-9, 6, 20001)
    for exact, ours in [
        (s.double().log1p(), _gumbel.log1p(s)),
        ((-s[s < 1]).double().log1p(), _gumbel.log1p(-s[s < 1])),
    ]:
        assert ((ours - exact) / exact).abs().max() < 3e-7
    assert (_gumbel.log(s) - s.double().log()).abs().max() < 2e-6
    y = torch.linspace(-20, 0, 20001)
    weight = _gumbel.weight(y)
    assert ((weight / _gumbel.ONE - y.double().exp()).abs() / y.double().exp()).max() < 5e-4
    assert (weight[1:] >= weight[:-1]).all() and weight[-1] == _gumbel.ONE


def test_noise_is_gumbels() -> None:
    tokens, zero = torch.arange(1 << 20), torch.zeros(1, dtype=torch.int64)
    noise = _gumbel.gumbel(zero + 3, zero, tokens).double().sort().values
    # Kolmogorov-Smirnov; 1.95 / sqrt(n) is the limit for one failure in a thousand.
    distance = (torch.exp(-torch.exp(-noise)) - (tokens + 0.5) / len(tokens)).abs().max()
    assert distance < 1.95 / math.sqrt(len(tokens))


# ---- the distribution -----------------------------------------------------------------------

FILTERS = [
    {},
    {"temperature": 2.0},
    {"top_k": 7},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"typical_p": 0.6},
    {"typical_p": 0.8, "top_k": 15, "top_p": 0.97, "min_p": 0.02},
    {"temperature": 1.5, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
]


@pytest.mark.parametrize("kwargs", FILTERS, ids=str)
def test_draws_follow_the_distribution(kwargs) -> None:
    logits, count = rand(23).float(), 40_000
    p = survivors(logits, **kwargs)
    counts = draws(logits, count, **kwargs).bincount(minlength=23)
    assert torch.equal(counts > 0, p > 0)
    expected = p[p > 0] * count
    chi_square = ((counts[p > 0] - expected) ** 2 / expected).sum()
    # Wilson and Hilferty's limit for one failure in a million.
    spread = 2 / (9 * (len(expected) - 1))
    assert chi_square < (len(expected) - 1) * (1 - spread + 4.75 * math.sqrt(spread)) ** 3


@pytest.mark.parametrize("vocab", [1, 2, 17, 129, 32000, 128256])
@pytest.mark.parametrize("kwargs", [*FILTERS[2:], {"top_k": 2000, "top_p": 0.99}], ids=str)
def test_no_token_outside_the_filters(vocab, kwargs) -> None:
    logits = rand(vocab, scale=3).float()
    # At the edge of the nucleus rounding decides; both sides of it are allowed.
    kept = survivors(logits, **kwargs)
    if kwargs.get("top_p"):
        kept = kept + survivors(logits, **kwargs | {"top_p": kwargs["top_p"] + 1e-6})
    if kwargs.get("typical_p"):
        kept = kept + survivors(logits, **kwargs | {"typical_p": kwargs["typical_p"] + 1e-6})
    tokens = draws(logits, 50, **kwargs)
    assert (kept[tokens] > 0).all()


def test_ties_go_to_lower_tokens() -> None:
    logits = torch.tensor([1.0, 2.0, -0.0, 2.0, 2.0, 0.0, 2.0])
    assert set(draws(logits, 500, top_k=3).tolist()) == {1, 3, 4}
    assert set(draws(logits, 500, top_k=6).tolist()) == {0, 1, 2, 3, 4, 6}  # -0 ties with 0
    assert set(draws(torch.zeros(10), 500, top_p=0.31).tolist()) == {0, 1, 2, 3}
    assert set(draws(torch.zeros(10), 500, top_p=0.0).tolist()) == {0}


@pytest.mark.parametrize("kwargs", [{"top_k": 1}, {"temperature": 0.0}, {"temperature": 1e-30}])
def test_greedy_is_argmax(kwargs) -> None:
    logits = rand(50, 333).float()
    assert torch.equal(ops.sample_tokens(logits, **kwargs)[0], logits.argmax(-1))
    if "temperature" not in kwargs or kwargs["temperature"] == 0:
        ties = torch.zeros(4, 333)
        ties[:, [100, 200]] = 5.0
        assert (ops.sample_tokens(ties, **kwargs)[0] == 100).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_log_probabilities_are_the_models_own(dtype) -> None:
    logits = rand(64, 1000, scale=4).to(dtype)
    allowed = torch.rand(64, 1000) < 0.5
    tokens, logprobs = ops.sample_tokens(logits, temperature=0.5, top_k=9, allowed=allowed)
    exact = logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    assert logprobs.dtype == torch.float32
    assert (logprobs - exact).abs().max() < 2e-6
    certain = torch.zeros(1, 5)
    certain[0, 3] = 18.0  # nothing of the others is lost beside the 1
    logprob = ops.sample_tokens(certain, top_k=1)[1].double()
    assert (logprob / certain.double().log_softmax(-1)[0, 3] - 1).abs() < 1e-4


# ---- seeds and rows -------------------------------------------------------------------------


def test_a_row_does_not_depend_on_its_batch() -> None:
    logits, seeds, steps = rand(9, 5000).float(), torch.arange(9) - 4, torch.arange(9) * 10**10
    top_k = torch.tensor([0, 50, 7] * 3)
    top_p = torch.tensor([1.0, 0.9, 1.0, 0.5, 1.0, 0.3, 0.8, 0.99, 1.0])
    together = ops.sample_tokens(logits, top_k=top_k, top_p=top_p, seeds=seeds, steps=steps)
    for i in range(9):
        alone = ops.sample_tokens(
            logits[i : i + 1],
            top_k=int(top_k[i]),
            top_p=float(top_p[i]),
            seeds=int(seeds[i]),
            steps=int(steps[i]),
        )
        assert alone[0] == together[0][i] and alone[1] == together[1][i]


def test_seeds_and_steps_give_other_tokens() -> None:
    logits = torch.zeros(1000, 50_000)
    steps = torch.arange(1000)
    by_step, by_seed = (
        ops.sample_tokens(logits, **numbers)[0]
        for numbers in ({"seeds": 0, "steps": steps}, {"seeds": steps, "steps": 0})
    )
    high = ops.sample_tokens(logits, seeds=steps << 32, steps=0)[0]
    for tokens in (by_step, by_seed, high):
        assert len(tokens.unique()) > 970  # 1000 of 50 000: ten or so meet by chance
    assert (by_step == by_seed).sum() <= 2
    torch.manual_seed(5)
    first = ops.sample_tokens(logits)[0]
    torch.manual_seed(5)
    assert torch.equal(ops.sample_tokens(logits)[0], first) and len(first.unique()) > 970


def test_rows_with_a_stride_are_read_in_place() -> None:
    wide = torch.randn(4, 70_000)
    view = wide[:, 5:60_005]
    with torch.profiler.profile(profile_memory=True) as profile:
        tokens, _ = ops.sample_tokens(view, top_k=50, top_p=0.9, seeds=3)
    assert sum(e.self_cpu_memory_usage for e in profile.key_averages()) < 1000
    assert torch.equal(tokens, ops.sample_tokens(view.clone(), top_k=50, top_p=0.9, seeds=3)[0])


# ---- beside transformers --------------------------------------------------------------------


def test_penalties_are_those_of_the_field() -> None:
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits = rand(40, 300).float()
    generated = torch.randint(300, (40, 100))
    counts = torch.zeros(40, 300, dtype=torch.int32)
    counts.scatter_add_(1, generated, torch.ones_like(generated, dtype=torch.int32))
    theirs = processors.RepetitionPenaltyLogitsProcessor(1.7)(generated, logits.clone())
    greedy = {"temperature": 0.0, "token_counts": counts}
    token, logprob = ops.sample_tokens(logits, repetition_penalty=1.7, **greedy)
    assert torch.equal(token, theirs.argmax(-1))
    own = logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
    torch.testing.assert_close(logprob, own)
    # OpenAI's definition, which vLLM has too.
    expected = theirs - 0.6 * counts - 0.9 * (counts > 0)
    penalties = {"presence_penalty": 0.9, "frequency_penalty": 0.6}
    token, _ = ops.sample_tokens(logits, repetition_penalty=1.7, **penalties, **greedy)
    assert torch.equal(token, expected.argmax(-1))
    # Of the prompt's tokens only the repetition penalty knows.
    greedy["token_counts"] = -(counts > 0).int()
    token, _ = ops.sample_tokens(logits, repetition_penalty=1.7, **penalties, **greedy)
    assert torch.equal(token, theirs.argmax(-1))


@pytest.mark.parametrize("typical_p", [1.0, 0.7, 0.2])
def test_filters_keep_what_those_of_transformers_keep(typical_p) -> None:
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits = rand(1, 60, scale=1.5).float()
    x = processors.TemperatureLogitsWarper(1.3)(None, logits)
    x = processors.TopKLogitsWarper(30)(None, x)
    x = processors.TopPLogitsWarper(0.95)(None, x)
    x = processors.MinPLogitsWarper(0.04)(None, x)
    kwargs = {"temperature": 1.3, "top_k": 30, "top_p": 0.95, "min_p": 0.04}
    if typical_p < 1:
        x = processors.TypicalLogitsWarper(typical_p)(None, x)
        kwargs["typical_p"] = typical_p
    drawn = draws(logits[0], 20_000, **kwargs).unique()
    assert drawn.tolist() == x[0].isfinite().nonzero()[:, 0].tolist()


# ---- masks and bad rows ---------------------------------------------------------------------


def test_masks() -> None:
    logits = torch.zeros(400, 70)
    allowed = torch.rand(70) < 0.3
    words = torch.zeros(96, dtype=torch.int64)
    words[:70] = allowed
    words = (words.view(3, 32) << torch.arange(32)).sum(1).int()
    plain, _ = ops.sample_tokens(logits, seeds=torch.arange(400), allowed=allowed.expand(400, -1))
    packed, _ = ops.sample_tokens(logits, seeds=torch.arange(400), allowed=words.expand(400, -1))
    assert torch.equal(plain, packed)
    assert plain.unique().tolist() == allowed.nonzero()[:, 0].tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("bad", ["nan", "inf", "nothing", "nothing_allowed"])
def test_bad_rows(bad) -> None:
    logits, allowed = rand(3, 40).float(), torch.ones(3, 40, dtype=torch.bool)
    if bad == "nothing":
        logits[1] = -torch.inf
    elif bad == "nothing_allowed":
        allowed[1] = False
    else:
        logits[1, 39] = float(bad)
        allowed[1, 39] = False  # the log-probabilities would be wrong all the same
    for implementation in ("reference", "cpu"):
        with (
            pytest.raises(ValueError, match="finite value in each row, row 1 has not"),
            aigc_fast.backend(implementation),
        ):
            ops.sample_tokens(logits, allowed=allowed, top_k=5, top_p=0.9)
    good, _ = ops.sample_tokens(logits[[0, 2]], top_k=5, top_p=0.9, seeds=4)
    with aigc_fast.backend("triton"):
        tokens, logprobs = ops.sample_tokens(
            logits.to(DEVICE), allowed=allowed.to(DEVICE), top_k=5, top_p=0.9, seeds=4
        )  # fmt: skip
    assert tokens.tolist() == [good[0], -1, good[1]]
    assert logprobs.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_values_of_a_row_are_refused_by_name(implementation) -> None:
    with aigc_fast.backend(implementation):
        for name, value, limits in [
            ("top_p", 1.5, "from 0 to 1"),
            ("temperature", torch.nan, "from 0 to inf"),
            ("repetition_penalty", 0.0, "from 1e-06 to 1e[+]06"),
        ]:
            values = torch.tensor([1.0, value, 1.0])
            with pytest.raises(ValueError, match=f"{name} must be {limits}, got .* in row 1"):
                ops.sample_tokens(rand(3, 5).float(), **{name: values})
