"""The diffusion trainer: what it asks for, its schedule and guard, going on where it stopped."""

import copy
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch import nn

from aigc_fast.models.diffusion import DiT, SmallUNet
from aigc_fast.training import (
    Denoising,
    DiffusionRecipe,
    DiffusionTrainer,
    load_checkpoint,
    save_checkpoint,
)
from aigc_fast.training.gradient_checkpointing import checkpoint_blocks

SAMPLES = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(10) % 2


def trainer(recipe=None, seed=0, steps=60):
    torch.manual_seed(0)
    model = SmallUNet(channels=(8, 16), num_classes=2)
    return DiffusionTrainer(model, recipe, done=lambda step: step / steps, null_label=2, seed=seed)


def video_dit(layers=4):
    config = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": layers}
    return DiT({**config, "in_channels": 1, "patch_size": (2, 2, 2), "num_embeds_ada_norm": 2})


def losses(of, epochs=2):
    states = of.train(SAMPLES, LABELS, epochs=epochs, batch_size=4)
    return [(s.epoch, s.step, s.loss.item()) for s in states]


class Probe(nn.Module):
    """Answers with `answer(noisy, timesteps)`, and keeps what it was asked."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.scale = answer, nn.Parameter(torch.ones(()))

    def forward(self, noisy, timesteps, labels):
        self.seen = noisy, timesteps, labels
        return self.scale * self.answer(noisy, timesteps)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "flow"])
def test_the_target_is_what_the_paper_says(prediction, schedule):
    # The answer of one who knows the sample, from the papers' own formulas.
    x0 = torch.linspace(-1, 1, 16).view(1, 1, 4, 4)
    betas = {
        "linear": torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64),
        "cosine": None,
    }[schedule]

    def answer(noisy, timesteps):
        t = timesteps.double().view(-1, 1, 1, 1)
        if prediction == "flow":
            return ((noisy - x0) / (t / 1000)).float()
        if betas is None:
            bar = torch.cos(((t + 1) / 1000 + 0.008) / 1.008 * torch.pi / 2) ** 2
            bar = bar / torch.cos(torch.tensor(0.008 / 1.008 * torch.pi / 2)) ** 2
        else:
            bar = (1 - betas).cumprod(0)[timesteps].view(-1, 1, 1, 1)
        alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
        noise = (noisy - alpha * x0) / sigma
        return (noise if prediction == "epsilon" else alpha * noise - sigma * x0).float()

    recipe = DiffusionRecipe(prediction, schedule)
    ours = DiffusionTrainer(Probe(answer), recipe, done=lambda step: 0.0)
    assert ours.loss(x0.expand(64, -1, -1, -1).contiguous()) < 1e-5


@pytest.mark.parametrize("prediction", ["epsilon", "v", "flow"])
def test_weights_are_those_of_the_papers(prediction):
    alpha = torch.tensor([0.999, 0.8, 0.5, 0.1, 0.0])
    sigma = 1 - alpha if prediction == "flow" else (1 - alpha**2).sqrt()
    snr = (alpha / sigma) ** 2
    # Min-SNR is defined by the error in the sample, P2 by that in the noise.
    of_sample = {"epsilon": 1 / snr, "v": 1 / (snr + 1), "flow": sigma**2}[prediction]
    of_noise = {"epsilon": torch.ones(5), "v": snr / (snr + 1), "flow": alpha**2}[prediction]
    expected = {"min_snr": snr.clamp(max=5) * of_sample, "p2": of_noise / (1 + snr)}
    for weighting, want in expected.items():
        got = Denoising(prediction, weighting=weighting).weights(alpha, sigma)
        finite = want.isfinite()  # 0 / 0 at no signal, where the limit is 1
        torch.testing.assert_close(got[finite], want[finite], rtol=1e-4, atol=1e-5)
        assert got.isfinite().all()


@pytest.mark.parametrize("prediction", ["epsilon", "v", "flow"])
def test_training_learns(prediction):
    # Two flat images: easily told apart, easily found again.
    labels = torch.arange(2).repeat(16)
    samples = (2.0 * labels - 1)[:, None, None, None].expand(-1, 1, 8, 8).contiguous()
    ours = trainer(DiffusionRecipe(prediction, lr=5e-3))
    states = list(ours.train(samples, labels, epochs=30, batch_size=16))
    found = torch.stack([state.loss for state in states])
    assert len(found) == 60
    assert found[-10:].mean() < 0.8 * found[:5].mean()
    assert str(states[1]).startswith("Epoch [1/30], Step [2/2], Loss: ")
    assert ours.optimizer.param_groups[0]["lr"] < 1e-5


@pytest.mark.parametrize(
    "recipe",
    [
        DiffusionRecipe(max_norm=1.0, weight_decay=0.01),
        DiffusionRecipe("epsilon", "linear", "min_snr"),
        DiffusionRecipe("flow", weighting="p2", gradient_checkpointing=True),
    ],
    ids=lambda recipe: recipe.prediction,
)
def test_goes_on_to_the_bit_after_an_interruption(recipe, tmp_path):
    whole = losses(trainer(recipe, 5), epochs=4)
    begun = trainer(recipe, 5)
    states = begun.train(SAMPLES, LABELS, epochs=4, batch_size=4)
    part = [(s.epoch, s.step, s.loss.item()) for s in islice(states, 3)]
    save_checkpoint(tmp_path / "checkpoint.pt", begun.state_dict())
    continued = trainer(recipe, 0)
    continued.load_state_dict(load_checkpoint(tmp_path / "checkpoint.pt"))
    assert part + losses(continued, epochs=4) == whole


def test_video_goes_on_to_the_bit_too(tmp_path):
    videos = torch.stack([SAMPLES, SAMPLES.flip(3)], dim=2)

    def begin(seed=5):
        torch.manual_seed(0)
        recipe = DiffusionRecipe(weighting="min_snr", gradient_checkpointing=True)
        model = video_dit(layers=1)
        return DiffusionTrainer(model, recipe, done=lambda step: step / 4, null_label=2, seed=seed)

    def run(trainer):
        return [s.loss.item() for s in trainer.train(videos, LABELS, epochs=2, batch_size=5)]

    whole, begun, continued = run(begin()), begin(), begin(seed=0)
    part = [s.loss.item() for s in begun.train(videos, LABELS, epochs=1, batch_size=5)]
    save_checkpoint(tmp_path / "checkpoint.pt", begun.state_dict())
    continued.load_state_dict(load_checkpoint(tmp_path / "checkpoint.pt"))
    assert part + run(continued) == whole and len(whole) == 4


def test_a_checkpoint_of_another_recipe_is_refused():
    with pytest.raises(ValueError, match="prediction"):
        trainer(DiffusionRecipe("flow")).load_state_dict(trainer().state_dict())


def test_labels_are_hidden_as_often_as_told():
    model = Probe(lambda noisy, timesteps: noisy)
    recipe = DiffusionRecipe(unlabelled=0.5)
    ours = DiffusionTrainer(model, recipe, done=lambda step: 0.0, null_label=2)
    ours.step(torch.zeros(1000, 1, 2, 2), torch.ones(1000, dtype=torch.int64))
    labels = model.seen[2]
    assert set(labels.tolist()) == {1, 2}
    assert 400 < (labels == 2).sum() < 600


def test_a_step_with_nan_is_skipped_and_counted():
    ours = trainer()
    ours.step(SAMPLES, LABELS)
    before = [copy.deepcopy(m.state_dict()) for m in (ours.model, ours.average)]
    assert ours.step(SAMPLES * torch.nan, LABELS).isnan()
    assert ours.skipped == 1
    after = [m.state_dict() for m in (ours.model, ours.average)]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert ours.step(SAMPLES, LABELS).isfinite() and ours.skipped == 1


def test_bf16_stays_near():
    exact, rounded = (
        torch.tensor(losses(trainer(DiffusionRecipe(bf16=bf16)))) for bf16 in (False, True)
    )
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05)


def test_gradient_checkpointing_changes_no_number():
    recipe = DiffusionRecipe()
    checkpointed = trainer(replace(recipe, gradient_checkpointing=True))
    assert losses(checkpointed) == losses(trainer(recipe))


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_gradient_checkpointing_keeps_less(kind):
    def kept(model):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: sizes.append(x.numel()) or x, lambda x: x
        ):
            model(samples, torch.arange(10), LABELS).sum()
        return sum(sizes)

    if kind == "unet":
        samples, model = SAMPLES, SmallUNet(channels=(8, 16), num_classes=2)
    else:
        samples, model = SAMPLES[:, :, None].expand(-1, -1, 4, -1, -1), video_dit()
    plain = kept(model)
    assert checkpoint_blocks(model) == 4
    assert kept(model) < plain / 2
    with pytest.raises(ValueError, match="ModuleList"):
        checkpoint_blocks(nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"prediction": "x0"}, "prediction must be one of epsilon, v, flow"),
        ({"schedule": "sqrt"}, "schedule must be one of cosine, linear"),
        ({"weighting": "snr"}, "weighting must be one of min_snr, p2"),
        ({"unlabelled": 2.0}, "unlabelled must be in"),
    ],
)
def test_recipes_refuse(options, match):
    with pytest.raises(ValueError, match=match):
        DiffusionRecipe(**options)


def test_a_name_is_no_recipe():
    with pytest.raises(TypeError, match="^recipe must be a DiffusionRecipe, got str$"):
        DiffusionTrainer(nn.Linear(1, 1), "v", done=lambda step: 0.0)
