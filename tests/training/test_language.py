"""The language trainer: its step against the textbook's, going on where it stopped; perplexity."""

import copy
import math
from itertools import islice

import pytest
import torch
import torch.nn.functional as F

from aigc_fast.models.autoregressive import DecoderConfig, DecoderLM
from aigc_fast.training import (
    LanguageRecipe,
    LanguageTrainer,
    load_checkpoint,
    perplexity,
    save_checkpoint,
    windows_of,
)
from aigc_fast.training.trainer import warm_up_and_cosine

VOCAB = 31
CONFIG = DecoderConfig(VOCAB, 16, 2, 2, 1, 8, 24, mlp_bias=True)
WINDOWS = torch.randint(VOCAB, (10, 9), generator=torch.Generator().manual_seed(0))


def trainer(recipe=None, seed=0, steps=40, dtype=torch.float32):
    torch.manual_seed(0)
    model = DecoderLM(CONFIG).to(dtype)
    return LanguageTrainer(model, recipe, done=lambda step: step / steps, seed=seed)


def losses(of, epochs=2):
    states = of.train(WINDOWS, epochs=epochs, batch_size=4)
    return [(s.epoch, s.step, s.loss.item()) for s in states]


def plain_loss(model, windows, **options):
    logits = model(windows)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), **options)


def test_a_step_is_the_textbook_step():
    recipe = LanguageRecipe(lr=1e-2, weight_decay=0.3, max_norm=0.1, label_smoothing=0.2)
    ours = trainer(recipe, dtype=torch.float64)
    model = copy.deepcopy(ours.model)
    decays = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() == 1]
    assert len(decays) == 9 and len(others) == 9
    groups = [{"params": decays, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}]
    plain = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for i in range(3):
        loss = plain_loss(model, WINDOWS, label_smoothing=0.2)
        plain.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        assert norm > 0.1
        for group in plain.param_groups:
            group["lr"] = 1e-2 * warm_up_and_cosine(i / 40)
        plain.step()
        torch.testing.assert_close(ours.step(WINDOWS), loss.detach())
    for a, b in zip(ours.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert ours.average is ours.model


@pytest.mark.parametrize("micro_batches", [2, 3, 10, 20])
def test_parts_of_a_batch_make_one_update(micro_batches):
    whole = trainer(dtype=torch.float64)
    parts = trainer(LanguageRecipe(micro_batches=micro_batches), dtype=torch.float64)
    seen, loss = [], parts.model.loss
    parts.model.loss = lambda ids, **options: (seen.append(len(ids)), loss(ids, **options))[1]
    for _ in range(2):
        torch.testing.assert_close(parts.step(WINDOWS), whole.step(WINDOWS))
    assert len(seen) == 2 * min(micro_batches, 10) and sum(seen) == 20
    for a, b in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_training_learns():
    # Each token follows from the one before it.
    table = torch.randperm(VOCAB)
    rows = [torch.arange(VOCAB)]
    for _ in range(7):
        rows.append(table[rows[-1]])
    windows = torch.stack(rows, 1)
    ours = trainer(LanguageRecipe(lr=2e-2, ema_decay=0.9), steps=100)
    states = list(ours.train(windows, epochs=15, batch_size=4))[:100]
    assert states[0].loss > 3
    assert str(states[0]).startswith("Epoch [1/15], Step [1/7], Loss: ")
    assert f"Perplexity: {math.exp(states[0].loss.item()):.4g}" in str(states[0])
    assert ours.average is not ours.model
    for model in (ours.model, ours.average):
        assert perplexity(model, windows) < 1.5
    assert ours.optimizer.param_groups[0]["lr"] < 1e-4


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_goes_on_to_the_bit_after_an_interruption(ema_decay, tmp_path):
    recipe = LanguageRecipe(ema_decay=ema_decay, micro_batches=2, z_loss=1e-2)
    one = trainer(recipe, 5)
    whole = losses(one, epochs=4)
    begun = trainer(recipe, 5)
    states = begun.train(WINDOWS, epochs=4, batch_size=4)
    part = [(s.epoch, s.step, s.loss.item()) for s in islice(states, 3)]
    save_checkpoint(tmp_path / "checkpoint.pt", begun.state_dict())
    continued = trainer(recipe, 0)
    continued.load_state_dict(load_checkpoint(tmp_path / "checkpoint.pt"))
    assert part + losses(continued, epochs=4) == whole
    for a, b in zip(one.average.parameters(), continued.average.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_step_with_nan_is_skipped_and_counted(monkeypatch):
    ours = trainer(LanguageRecipe(ema_decay=0.9))
    ours.step(WINDOWS)
    before = [copy.deepcopy(m.state_dict()) for m in (ours.model, ours.average)]
    loss = ours.model.loss
    with monkeypatch.context() as broken:
        broken.setattr(ours.model, "loss", lambda *a, **k: loss(*a, **k) * torch.nan)
        assert ours.step(WINDOWS).isnan()
    assert ours.skipped == 1
    after = [m.state_dict() for m in (ours.model, ours.average)]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert ours.step(WINDOWS).isfinite() and ours.skipped == 1


def test_bf16_stays_near():
    exact, rounded = (
        torch.tensor(losses(trainer(LanguageRecipe(bf16=bf16)))) for bf16 in (False, True)
    )
    torch.testing.assert_close(rounded, exact, rtol=0.01, atol=0.01)
    assert not torch.equal(rounded, exact)


def test_gradient_checkpointing_keeps_the_blocks_inputs_alone():
    plain, less = (trainer(LanguageRecipe(gradient_checkpointing=on)) for on in (False, True))
    kept = []
    for of in (plain, less):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: (sizes.append(t.numel()), t)[1], lambda t: t
        ):
            of.model.loss(WINDOWS)
        kept.append(sum(sizes))
    assert kept[1] < 0.5 * kept[0]
    assert losses(less) == losses(plain)
    assert less.model.state_dict().keys() == plain.model.state_dict().keys()


def test_frozen_weights_stay():
    torch.manual_seed(0)
    model = DecoderLM(CONFIG)
    model.embed_tokens.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    ours = LanguageTrainer(model, LanguageRecipe(ema_decay=0.9), done=lambda step: step / 4)
    for _ in range(4):
        ours.step(WINDOWS)
    same = {key for key, value in model.state_dict().items() if value.equal(before[key])}
    assert same == {"embed_tokens.weight"}


def test_perplexity_is_that_of_the_logits():
    model = trainer().model
    with torch.no_grad():
        want = plain_loss(model, WINDOWS).exp().item()
    for batch_size in (1, 3, 10):
        assert perplexity(model, WINDOWS, batch_size=batch_size) == pytest.approx(want, rel=1e-5)
    with torch.no_grad():
        model.embed_tokens.weight.fill_(torch.nan)
    assert math.isnan(perplexity(model, WINDOWS))


@pytest.mark.parametrize("windows", [WINDOWS[0], WINDOWS[:0], WINDOWS[:, :1]])
def test_perplexity_needs_tokens_to_predict(windows):
    with pytest.raises(ValueError, match=r"windows must be \(count, seq\)"):
        perplexity(trainer().model, windows)


def test_windows_lie_side_by_side():
    assert windows_of(torch.arange(8), 3).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert windows_of(torch.arange(2), 3).shape == (0, 3)
    with pytest.raises(ValueError, match="seq must be at least 1"):
        windows_of(torch.arange(2), 0)


def test_a_checkpoint_of_another_recipe_is_refused():
    with pytest.raises(ValueError, match="lr differ"):
        trainer(LanguageRecipe(lr=1e-4)).load_state_dict(trainer().state_dict())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"label_smoothing": 2.0}, "label_smoothing must be in"),
        ({"z_loss": -1.0}, "z_loss must be at least 0"),
        ({"lr": math.inf}, "lr must be at least 0 and finite"),
        ({"micro_batches": 0}, "micro_batches must be at least 1"),
    ],
)
def test_recipes_refuse(options, match):
    with pytest.raises(ValueError, match=match):
        LanguageRecipe(**options)
