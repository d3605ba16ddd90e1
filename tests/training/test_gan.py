"""The trainer: every recipe, its schedule, its guard, and going on where it was stopped."""

import copy
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch import nn

from aigc_fast.models.gan import (
    DCGANDiscriminator,
    DCGANGenerator,
    MLPDiscriminator,
    MLPGenerator,
    StyleGAN2Discriminator,
    StyleGAN2Generator,
)
from aigc_fast.training import (
    RECIPES,
    GANRecipe,
    GANTrainer,
    load_checkpoint,
    save_checkpoint,
)

SAMPLES = torch.randn(10, 1, 28, 28, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(10) % 3


def trainer(recipe, seed=0, num_classes=None, **options):
    torch.manual_seed(0)
    norm = "batch" if recipe.penalty is None else None
    generator = DCGANGenerator(28, 1, 2, latent_dim=4, num_classes=num_classes)
    discriminator = DCGANDiscriminator(28, 1, 2, norm, num_classes)
    return GANTrainer(generator, discriminator, 4, recipe, seed=seed, **options)


def losses(of, epochs=2, labels=None):
    states = of.train(SAMPLES, labels, epochs=epochs, batch_size=4)
    return [(s.epoch, s.step, s.g_loss.item(), s.d_loss.item()) for s in states]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains(name):
    ours = trainer(RECIPES[name])
    before = copy.deepcopy(ours.generator.state_dict())
    found = losses(ours)
    assert len(found) == 4 and all(torch.tensor(found).isfinite().flatten())
    assert any(not torch.equal(before[k], v) for k, v in ours.generator.state_dict().items())
    assert ours.skipped == 0


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("name", ["hinge", "wgan-gp", "r3gan"])
def test_goes_on_to_the_bit_after_an_interruption(name, conditional, tmp_path):
    recipe = replace(RECIPES[name], instance_noise=0.1)
    labels, classes = (LABELS, 3) if conditional else (None, None)
    whole = losses(trainer(recipe, 5, classes), epochs=4, labels=labels)
    begun = trainer(recipe, 5, classes)
    states = begun.train(SAMPLES, labels, epochs=4, batch_size=4)
    part = [(s.epoch, s.step, s.g_loss.item(), s.d_loss.item()) for s in islice(states, 3)]
    save_checkpoint(tmp_path / "checkpoint.pt", begun.state_dict())
    continued = trainer(recipe, 0, classes)
    continued.load_state_dict(load_checkpoint(tmp_path / "checkpoint.pt"))
    assert part + losses(continued, epochs=4, labels=labels) == whole


def test_networks_that_draw_from_torch_itself_go_on_to_the_bit():
    """The noise of StyleGAN2 is of torch's own generator."""
    samples = torch.rand(16, 3, 8, 8) * 2 - 1

    def trainer():
        torch.manual_seed(0)
        networks = (
            StyleGAN2Generator(8, 16, 2, max_channels=8),
            StyleGAN2Discriminator(8, max_channels=8),
        )
        return GANTrainer(*networks, 16, RECIPES["r1"])

    def next_losses(trainer, steps):
        states = trainer.train(samples, epochs=2, batch_size=4)
        return [(s.g_loss.item(), s.d_loss.item()) for s in islice(states, steps)]

    first = trainer()
    next_losses(first, 3)
    state = copy.deepcopy(first.state_dict())
    expected = next_losses(first, 5)
    second = trainer()
    torch.manual_seed(1)
    second.load_state_dict(state)
    assert next_losses(second, 5) == expected


def stylegan2(seed=0, cuda_graph=False, **recipe):
    torch.manual_seed(0)
    generator = StyleGAN2Generator(8, 16, 2, max_channels=8).double()
    discriminator = StyleGAN2Discriminator(8, max_channels=8).double()
    recipe = GANRecipe(**recipe)
    return GANTrainer(generator, discriminator, 16, recipe, seed=seed, cuda_graph=cuda_graph)


def test_path_length_is_a_part_of_the_generators_gradient():
    """Value, gradient and moving average are those of plain torch, every second update."""
    real = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    ours, without = stylegan2(path_length_weight=3.0, path_length_interval=2), stylegan2()
    before = copy.deepcopy(ours.generator)
    ours.step(real)
    without.step(real)
    random = torch.Generator().manual_seed(0)  # as the trainer draws: of a step, then of penalties
    torch.empty(4, 16, dtype=torch.float64).normal_(generator=random)
    z = torch.empty(2, 16, dtype=torch.float64).normal_(generator=random)
    w = before.map(z).unsqueeze(1).repeat(1, before.num_styles, 1)
    images = before.synthesize(w, "none")  # its strength starts at zero
    noise = torch.empty_like(images).normal_(generator=random) / 8
    (j,) = torch.autograd.grad((images * noise).sum(), w, create_graph=True)
    lengths = j.square().sum(2).mean(1).sqrt()
    mean = 0.01 * lengths.mean().detach()
    expected = torch.autograd.grad(
        3.0 * 2 * (lengths - mean).square().mean(), list(before.parameters()), allow_unused=True
    )
    torch.testing.assert_close(ours.path_length.double(), mean, rtol=1e-6, atol=0)
    found = zip(ours.g_parameters, without.g_parameters, expected, strict=True)
    assert sum(e is not None and bool(e.any()) for e in expected) > 5
    for (with_it, plain, e), (name, _) in zip(found, before.named_parameters(), strict=True):
        if not name.endswith("noise.weight"):  # whose gradient is of the noise that was drawn
            gradient = with_it.grad - plain.grad
            torch.testing.assert_close(gradient, torch.zeros_like(plain) if e is None else e)
    ours.step(real)
    assert ours.path_length.double().sub(mean).abs() < 1e-6 * mean  # not in this update
    ours.step(real)
    assert ours.path_length > 1.5 * mean


def test_path_length_goes_on_to_the_bit_and_survives_nan():
    options = dict(path_length_weight=2.0, path_length_interval=2, n_critic=2, betas=(0.0, 0.99))
    real = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    whole = stylegan2(**options)
    for _ in range(3):
        whole.step(real)
    state = copy.deepcopy(whole.state_dict())
    expected = [whole.step(real)[0].item() for _ in range(4)]
    continued = stylegan2(seed=1, **options)
    continued.load_state_dict(state)
    assert [continued.step(real)[0].item() for _ in range(4)] == expected
    assert continued.path_length.equal(whole.path_length) and whole.path_length > 0
    kept = whole.path_length.clone()
    with torch.no_grad():
        whole.generator.input["input"].mul_(torch.nan)
    for _ in range(4):
        whole.step(real)
    assert whole.path_length.equal(kept) and whole.skipped > 0


def test_path_length_needs_styles():
    recipe = GANRecipe(path_length_weight=2.0)
    with pytest.raises(ValueError, match="path_length_weight must be 0 for a generator without"):
        trainer(recipe)
    generator, discriminator = nn.Linear(4, 4), nn.Linear(4, 1)
    generator.synthesize, generator.num_styles = generator.forward, 1
    with pytest.raises(ValueError, match="for Linear, which has no map$"):
        GANTrainer(generator, discriminator, 4, recipe)


def test_a_checkpoint_of_another_recipe_is_refused():
    state = trainer(RECIPES["wgan-gp"]).state_dict()
    with pytest.raises(ValueError, match="the checkpoint, d_lr, g_lr differ"):
        trainer(replace(RECIPES["wgan-gp"], g_lr=1.0, d_lr=1.0)).load_state_dict(state)


def test_the_generator_moves_every_n_critic_steps():
    ours = trainer(GANRecipe("wasserstein", n_critic=3))
    moved = []
    for _ in range(6):
        before = ours.generator.main[0].weight.clone()
        ours.step(SAMPLES[:4])
        moved.append(not torch.equal(before, ours.generator.main[0].weight))
    assert moved == [True, False, False] * 2
    assert ours.ema.updates == 2


def test_learning_rates_fall_along_a_line():
    ours = trainer(GANRecipe(g_lr=0.4, d_lr=0.8, lr_falls_from=0.5))
    ours.done = lambda step: step / 8
    rates = []
    for _ in range(9):
        ours.step(SAMPLES[:4])
        rates.append(ours.d_optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.8] * 5 + [0.6, 0.4, 0.2, 0.0])
    assert ours.g_optimizer.param_groups[0]["lr"] == 0


def test_lazy_penalties_weigh_as_much_more(monkeypatch):
    ours = trainer(GANRecipe(penalty="r1", penalty_weight=3.0, penalty_interval=2))
    asked = []
    monkeypatch.setattr(
        ours, "_penalty", lambda *_: (asked.append(ours.steps_done), torch.zeros(()))[1]
    )
    for _ in range(4):
        ours.step(SAMPLES[:4])
    assert asked == [0, 2]


def test_weights_are_clipped():
    ours = trainer(GANRecipe("wasserstein", weight_clip=0.01))
    ours.step(SAMPLES[:4])
    assert max(p.abs().max() for p in ours.discriminator.parameters()) <= 0.01


def test_a_step_with_nan_is_skipped_and_counted():
    ours = trainer(RECIPES["wgan-gp"])
    before = copy.deepcopy(ours.discriminator.state_dict())
    ours.step(SAMPLES[:4] * torch.nan)
    assert ours.skipped == 1  # the generator's own loss was fine
    torch.testing.assert_close(ours.discriminator.state_dict(), before, rtol=0, atol=0)
    ours.step(SAMPLES[:4])
    assert ours.skipped == 1


def test_bf16_stays_near():
    exact, rounded = (
        torch.tensor(losses(trainer(replace(RECIPES["wgan-gp"], bf16=bf16)), epochs=1))
        for bf16 in (False, True)
    )
    torch.testing.assert_close(rounded, exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"loss": "bce"}, "loss must be one of non_saturating"),
        ({"penalty": "gp"}, "penalty must be one of gradient"),
        ({"n_critic": 0}, "n_critic must be a whole number, at least 1, got 0"),
        ({"penalty_interval": 2.5}, "penalty_interval must be a whole number"),
        ({"penalty_weight": float("nan")}, "penalty_weight must be at least 0 and finite"),
        ({"instance_noise": -1.0}, "instance_noise must be at least 0"),
        ({"d_lr": float("inf")}, "d_lr must be at least 0 and finite"),
        ({"weight_clip": 0.0}, "weight_clip must be positive"),
    ],
)
def test_recipes_refuse(options, match):
    with pytest.raises(ValueError, match=match):
        GANRecipe(**options)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((4, "wgan-gp"), "^recipe must be a GANRecipe, got str$"),
        ((4, GANRecipe), "^recipe must be a GANRecipe, got a class$"),
        (("wgan-gp",), "^latent_dim must be an integer, got str$"),
    ],
)
def test_a_name_is_no_recipe(arguments, match):
    with pytest.raises(TypeError, match=match):
        GANTrainer(MLPGenerator((4, 6)), MLPDiscriminator((6, 1)), *arguments)


def test_batch_norms_see_real_and_generated_samples_apart():
    ours = trainer(RECIPES["non-saturating"])
    sizes = []
    ours.discriminator.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    ours.step(SAMPLES[:4])
    assert sizes == [4, 4, 4]
    assert any(isinstance(m, nn.BatchNorm2d) for m in ours.discriminator.modules())


def test_a_batch_with_nan_does_not_stay_in_batch_norms():
    ours = trainer(GANRecipe())
    spoilt = SAMPLES[:4].clone()
    spoilt[0, 0, 3, 3] = torch.nan
    for samples in (SAMPLES[:4], spoilt, SAMPLES[4:8]):
        ours.step(samples)
    assert ours.skipped == 1
    running = [b for net in ours.networks.values() for n, b in net.named_buffers() if "run" in n]
    assert len(running) >= 4 and all(buffer.isfinite().all() for buffer in running)
    # And it goes on: the third batch has moved them.
    before = [buffer.clone() for buffer in running]
    ours.step(SAMPLES[4:8])
    assert not any(torch.equal(a, b) for a, b in zip(before, running, strict=True))


def test_a_batch_with_nan_right_after_a_checkpoint_leaves_its_statistics():
    before, after = trainer(GANRecipe()), trainer(GANRecipe())
    for _ in range(3):
        before.step(SAMPLES[:4])
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    after.step(SAMPLES[:4] * torch.nan)
    for name, network in after.networks.items():
        for key, value in network.named_buffers():
            if "running" in key and name == "discriminator":
                torch.testing.assert_close(value, before.networks[name].get_buffer(key))


@pytest.mark.parametrize("penalty", [None, "r1"])
def test_frozen_layers_stay_and_the_others_learn(penalty):
    """As FreezeD does (arXiv:2002.10964)."""
    torch.manual_seed(0)
    generator = DCGANGenerator(28, 1, 2, latent_dim=4)
    discriminator = DCGANDiscriminator(28, 1, 2, None)
    frozen = [next(network.parameters()) for network in (generator, discriminator)]
    for parameter in frozen:
        parameter.requires_grad_(False)
    ours = GANTrainer(generator, discriminator, 4, GANRecipe(penalty=penalty, weight_clip=1e-3))
    before = {name: copy.deepcopy(net.state_dict()) for name, net in ours.networks.items()}
    kept = [parameter.clone() for parameter in frozen]
    ours.step(SAMPLES[:4])
    assert all(map(torch.equal, kept, frozen))
    for name, network in ours.networks.items():
        assert any(not torch.equal(before[name][k], v) for k, v in network.state_dict().items())


@pytest.mark.parametrize("batch_size", [0, -1, 11])
def test_batches_that_cannot_be_are_refused(batch_size):
    with pytest.raises(ValueError, match="batch_size must be 1 to 10"):
        next(trainer(GANRecipe()).train(SAMPLES, epochs=1, batch_size=batch_size))
