"""Batches, averages, and the GAN's training step against its plain definition."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aigc_fast.models.gan import MLPDiscriminator, MLPGenerator
from aigc_fast.training import EMA, GANRecipe, GANTrainer, batches


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_batches_cover_the_rows_once_and_keep_them_together():
    x = torch.arange(10)
    found = list(batches(x, 2 * x, batch_size=3, generator=seeded()))
    assert [len(a) for a, _ in found] == [3, 3, 3]
    assert all(torch.equal(2 * a, b) for a, b in found)
    assert len(torch.cat([a for a, _ in found]).unique()) == 9
    again = list(batches(x, 2 * x, batch_size=3, generator=seeded()))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(found, again, strict=True))


@pytest.mark.parametrize("batch_size", [0, 11])
def test_batches_refuse_a_size_that_yields_nothing(batch_size):
    with pytest.raises(ValueError, match="batch_size must be 1 to 10"):
        next(batches(torch.arange(10), batch_size=batch_size, generator=seeded()))


def test_batches_refuse_tensors_of_different_lengths():
    with pytest.raises(ValueError, match="of one length"):
        next(batches(torch.arange(4), torch.arange(5), batch_size=1, generator=seeded()))


def test_pixels_train_as_the_numbers_they_stand_for():
    pixels = torch.arange(256, dtype=torch.uint8).repeat(4).view(16, 64)
    losses = []
    for samples in (pixels, pixels.float() / 127.5 - 1):
        torch.manual_seed(0)
        networks = MLPGenerator((4, 64)), MLPDiscriminator((64, 1))
        steps = GANTrainer(*networks, 4).train(samples, epochs=2, batch_size=4)
        losses.append(torch.stack([state.d_loss for state in steps]))
    assert losses[0].isfinite().all() and torch.equal(*losses)


def test_ema_follows_and_forgets_its_start():
    model = nn.BatchNorm1d(1, affine=True)
    ema = EMA(model, decay=0.9)
    with torch.no_grad():
        model.weight.fill_(5.0)
        model.running_mean.fill_(3.0)
    expected = 1.0
    for update in range(100):
        decay = min(0.9, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * 5.0
        ema.update(model)
    assert ema.model.weight.item() == pytest.approx(expected, rel=1e-5)
    assert ema.model.running_mean.item() == pytest.approx(3 * (expected - 1) / 4, rel=1e-5)
    assert not ema.model.weight.requires_grad and not ema.model.training


def test_ema_refuses_a_decay_that_never_moves():
    with pytest.raises(ValueError, match="decay must be in"):
        EMA(nn.Linear(1, 1), 1.0)


def small_gan():
    torch.manual_seed(0)
    generator = MLPGenerator((4, 8, 6)).double()
    return generator, MLPDiscriminator((6, 8, 1)).double()


def test_gan_step_is_the_textbook_step(monkeypatch):
    generator, discriminator = small_gan()
    ours = GANTrainer(*copy.deepcopy((generator, discriminator)), latent_dim=4)
    latents = torch.randn(5, 4, dtype=torch.float64)
    monkeypatch.setattr(ours, "latents", lambda batch: latents)
    real = torch.randn(5, 6, dtype=torch.float64)
    g_loss, d_loss = ours.step(real)

    g_adam = torch.optim.Adam(generator.parameters(), 2e-4, (0.5, 0.999))
    d_adam = torch.optim.Adam(discriminator.parameters(), 2e-4, (0.5, 0.999))
    bce, one, zero = F.binary_cross_entropy_with_logits, torch.ones(5, 1), torch.zeros(5, 1)
    fake = generator(latents)
    plain_d = bce(discriminator(real), one.double())
    plain_d = plain_d + bce(discriminator(fake.detach()), zero.double())
    d_adam.zero_grad()
    plain_d.backward()
    d_adam.step()
    plain_g = bce(discriminator(fake), one.double())
    g_adam.zero_grad()
    plain_g.backward()
    g_adam.step()

    torch.testing.assert_close(d_loss, plain_d.detach())
    torch.testing.assert_close(g_loss, plain_g.detach())
    for model, plain in ((ours.generator, generator), (ours.discriminator, discriminator)):
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a, b)


def test_instance_noise_reaches_the_discriminator_and_not_the_generator(monkeypatch):
    trainer = GANTrainer(*small_gan(), 4, GANRecipe(instance_noise=0.5))
    seen, judge = [], trainer.discriminator.forward
    monkeypatch.setattr(trainer.discriminator, "forward", lambda x: (seen.append(x), judge(x))[1])
    real = torch.zeros(500, 6, dtype=torch.float64)
    trainer.step(real)
    assert 0.45 < seen[0][:500].std() < 0.55
    assert real.count_nonzero() == 0


def test_gan_training_repeats_itself_and_tells_where_it_is():
    def train():
        trainer = GANTrainer(*(m.float() for m in small_gan()), latent_dim=4, seed=3)
        samples = torch.randn(10, 6, generator=seeded())
        return [str(state) for state in trainer.train(samples, epochs=2, batch_size=4)]

    lines = train()
    assert lines == train()
    assert [line.split(", G")[0] for line in lines] == [
        f"Epoch [{epoch}/2], Step [{step}/2]" for epoch in (1, 2) for step in (1, 2)
    ]
    assert "G Loss: 0." in lines[0] and "D Loss: 1." in lines[0]


@pytest.mark.parametrize("seed", [-1, 2**32, 2**62])
def test_any_seed_of_torch_orders_the_rows(seed):
    networks = MLPGenerator((2, 8, 4)), MLPDiscriminator((4, 8, 1))
    trainer = GANTrainer(*networks, 2, seed=seed)
    assert len(list(trainer.train(torch.randn(8, 4), epochs=2, batch_size=4))) == 4


def test_whoever_iterates_may_stop():
    trainer = GANTrainer(*(m.float() for m in small_gan()), latent_dim=4)
    states = trainer.train(torch.randn(8, 6), epochs=10**9, batch_size=4)
    assert [state.step for state in itertools.islice(states, 3)] == [1, 2, 1]
