"""The VAE trainer: what it minimises, its schedule and guard, going on where it stopped; and the
bound that judges a model."""

import copy
from itertools import islice

import pytest
import torch
from torch import nn

from aigc_fast.models.vae import ConvVAE
from aigc_fast.training import (
    VAERecipe,
    VAETrainer,
    load_checkpoint,
    log_likelihood,
    save_checkpoint,
)
from aigc_fast.training.vae import images_of

SAMPLES = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(0)).tanh()
LABELS = torch.arange(10) % 2


def trainer(recipe=None, seed=0, steps=60, num_classes=None):
    torch.manual_seed(0)
    model = ConvVAE(8, 1, 8, 3, num_classes)
    return VAETrainer(model, recipe, done=lambda step: step / steps, seed=seed)


def losses(of, epochs=2, labels=None):
    states = of.train(SAMPLES, labels, epochs=epochs, batch_size=4)
    return [(s.epoch, s.step, s.loss.item(), s.kl.item()) for s in states]


class Linear(nn.Module):
    """A model whose likelihood is known: z and the noise of x = z + mean are standard normal, and
    the encoder gives the true posterior, or something broader."""

    def __init__(self, extra=0.0):
        super().__init__()
        self.mean, self.extra = nn.Parameter(torch.tensor(0.3)), extra

    def encode(self, images):
        mean = (images.flatten(1) - self.mean) / 2
        return torch.cat([mean, torch.full_like(mean, 0.5).log() + self.extra], 1)

    def decode(self, latents):
        return latents[:, :, None, None] + self.mean


def test_the_bound_is_the_likelihood_where_the_encoder_is_right():
    x = torch.linspace(-1, 1, 5).view(5, 1, 1, 1)
    want = torch.distributions.Normal(0.3, 2**0.5).log_prob(x.flatten())
    for samples in (1, 3):
        got = log_likelihood(Linear(), x, samples=samples, likelihood="gaussian")
        torch.testing.assert_close(got, want)


def test_more_samples_come_closer():
    x = torch.zeros(2000, 1, 1, 1)
    want = torch.distributions.Normal(0.3, 2**0.5).log_prob(torch.zeros(()))
    random = torch.Generator().manual_seed(0)
    elbo, some, many = (
        log_likelihood(Linear(1.0), x, samples=k, likelihood="gaussian", generator=random).mean()
        for k in (1, 5, 100)
    )
    assert elbo < some - 0.1 < many - 0.1
    torch.testing.assert_close(many, want, rtol=0, atol=0.01)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "laplace"])
def test_one_sample_is_the_loss(likelihood):
    ours = trainer(VAERecipe(likelihood, warm_up=0.0))
    loss = torch.stack([sum(ours.terms(SAMPLES)).mean() for _ in range(300)]).mean()
    found = [
        log_likelihood(ours.model, SAMPLES, samples=1, likelihood=likelihood) for _ in range(300)
    ]
    constant = {"bernoulli": 0.0, "gaussian": 0.918939, "laplace": 0.693147}[likelihood] * 64
    torch.testing.assert_close(loss, -torch.cat(found).mean() - constant, rtol=0.01, atol=0)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "laplace"])
def test_training_learns(likelihood):
    # Two flat images: easily told apart, easily found again.
    flat = (2.0 * LABELS - 1)[:, None, None, None].expand(-1, 1, 8, 8).contiguous()
    ours = trainer(VAERecipe(likelihood, lr=1e-2))
    states = list(ours.train(flat.repeat(4, 1, 1, 1), epochs=30, batch_size=20))
    found = torch.stack([state.loss for state in states])
    assert len(found) == 60
    assert found[-5:].mean() < 0.5 * found[:5].mean()
    assert str(states[1]).startswith("Epoch [1/30], Step [2/2], Reconst Loss: ")
    assert ours.optimizer.param_groups[0]["lr"] < 1e-5
    again = images_of(ours.model(flat), likelihood)
    assert (again.sign() == flat).float().mean() > 0.95


def test_latents_may_be_maps():
    class Maps(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Conv2d(1, 4, 2, 2), nn.ConvTranspose2d(2, 1, 2, 2)

        def encode(self, images):
            return self.down(images)

        def decode(self, latents):
            return self.up(latents)

    torch.manual_seed(0)
    recipe = VAERecipe("gaussian", warm_up=0.0, lr=1e-2, bf16=True)
    ours = VAETrainer(Maps(), recipe, done=lambda step: step / 20)
    first, *_, last = (ours.step(SAMPLES)[0] for _ in range(20))
    assert last < first
    assert log_likelihood(ours.average, SAMPLES, samples=2, likelihood="gaussian").shape == (10,)


@pytest.mark.parametrize("conditional", [False, True])
def test_goes_on_to_the_bit_after_an_interruption(conditional, tmp_path):
    recipe = VAERecipe("laplace", beta=2.0, warm_up=0.2, free_bits=0.5, max_norm=1.0)
    labels, classes = (LABELS, 2) if conditional else (None, None)
    whole = losses(trainer(recipe, 5, num_classes=classes), epochs=4, labels=labels)
    begun = trainer(recipe, 5, num_classes=classes)
    states = begun.train(SAMPLES, labels, epochs=4, batch_size=4)
    part = [(s.epoch, s.step, s.loss.item(), s.kl.item()) for s in islice(states, 3)]
    save_checkpoint(tmp_path / "checkpoint.pt", begun.state_dict())
    continued = trainer(recipe, 0, num_classes=classes)
    continued.load_state_dict(load_checkpoint(tmp_path / "checkpoint.pt"))
    assert part + losses(continued, epochs=4, labels=labels) == whole


def test_the_weight_of_the_divergence_rises():
    recipe = VAERecipe(beta=4.0, warm_up=0.5)
    assert [recipe.weight(done) for done in (0.0, 0.25, 0.5, 1.0)] == [0.0, 2.0, 4.0, 4.0]
    ours = trainer(VAERecipe(warm_up=0.5), steps=4)
    terms = [ours.step(SAMPLES) for _ in range(4)]
    weights = [((loss - reconstruction) / kl).item() for loss, reconstruction, kl in terms]
    assert weights == pytest.approx([0.0, 0.5, 1.0, 1.0], abs=1e-3)


def test_free_bits_cost_nothing():
    ours = trainer(VAERecipe(warm_up=0.0, free_bits=50.0))
    loss, reconstruction, kl = ours.step(SAMPLES)
    assert kl < 50
    torch.testing.assert_close(loss - reconstruction, torch.tensor(50.0))


def test_a_step_with_nan_is_skipped_and_counted():
    ours = trainer()
    ours.step(SAMPLES)
    before = [copy.deepcopy(m.state_dict()) for m in (ours.model, ours.average)]
    assert ours.step(SAMPLES * torch.nan)[0].isnan()
    assert ours.skipped == 1
    after = [m.state_dict() for m in (ours.model, ours.average)]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert ours.step(SAMPLES)[0].isfinite() and ours.skipped == 1


def test_bf16_stays_near():
    exact, rounded = (torch.tensor(losses(trainer(VAERecipe(bf16=bf16)))) for bf16 in (False, True))
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05)


def test_a_checkpoint_of_another_recipe_is_refused():
    with pytest.raises(ValueError, match="beta differ"):
        trainer(VAERecipe(beta=2.0)).load_state_dict(trainer().state_dict())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"likelihood": "poisson"}, "likelihood must be one of bernoulli, gaussian, laplace"),
        ({"warm_up": 2.0}, "warm_up must be in"),
        ({"beta": -1.0}, "beta must be at least 0"),
        ({"free_bits": -1.0}, "free_bits must be at least 0"),
    ],
)
def test_recipes_refuse(options, match):
    with pytest.raises(ValueError, match=match):
        VAERecipe(**options)


def test_a_name_is_no_recipe():
    with pytest.raises(TypeError, match="^recipe must be a VAERecipe, got str$"):
        VAETrainer(nn.Linear(1, 1), "v", done=lambda step: 0.0)


def test_the_bound_needs_a_sample():
    with pytest.raises(ValueError, match="samples must be at least 1"):
        log_likelihood(Linear(), torch.zeros(1, 1, 1, 1), samples=0)
