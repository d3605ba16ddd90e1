"""The vocoder trainer: what a step minimises, its guard, going on where it stopped."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from aigc_fast.models.vocoder import (
    HiFiGANGenerator,
    MelConfig,
    MelSpectrogram,
    VocoderDiscriminator,
)
from aigc_fast.models.vocoder.weight_norm import weight_norm
from aigc_fast.training import (
    VocoderRecipe,
    VocoderTrainer,
    load_checkpoint,
    save_checkpoint,
    segments_of,
)

MEL = MelConfig(8000, 64, 16, 64, 8, fmax=3000.0)
RECIPE = VocoderRecipe(segment=256)
TIMES = torch.arange(3000)
SOUND = [(8000 * (0.05 * (n + 1) * TIMES).sin()).to(torch.int16) for n in range(3)]
SAMPLES = segments_of(SOUND, 256)


def trainer(recipe=RECIPE, seed=0):
    torch.manual_seed(0)
    generator = HiFiGANGenerator((4, 4), (8, 8), 16, (3,), ((1, 2),), "2", in_channels=8)
    discriminator = VocoderDiscriminator(4)
    return VocoderTrainer(
        weight_norm(generator), discriminator, MelSpectrogram(MEL), recipe, seed=seed
    )


def losses(of, epochs=1, until=None):
    found = []
    for state in of.train(SAMPLES, epochs=epochs, batch_size=12):
        found.append((state.epoch, state.step, *(x.item() for x in state[4:])))
        if len(found) == until:
            break
    return found


def test_segments_begin_anywhere_and_miss_nothing():
    assert SAMPLES.shape == (33, 512) and SAMPLES.dtype == torch.int16
    count = 11  # of each waveform of 3000 samples: 12 segments
    assert torch.equal(SAMPLES[::count, :256], torch.stack([x[:256] for x in SOUND]))
    whole = torch.cat([SAMPLES[:count, :256].flatten(), SAMPLES[count - 1, 256:]])
    assert torch.equal(whole[:3000], SOUND[0]) and not whole[3000:].any()
    assert torch.equal(segments_of([SOUND[0][:3]], 8)[0, :3], SOUND[0][:3])
    ramp = torch.arange(1024, dtype=torch.int16)
    found = trainer()._cut(segments_of([ramp], 256).repeat(300, 1)).mul(32768)[:, 0]
    assert (found.diff() == 1).all()
    firsts = found[:, 0].long().bincount(minlength=768)
    assert len(firsts) == 768 and (firsts.view(6, 128).sum(1) > 100).all()


def test_a_step_is_that_of_the_paper():
    ours, real = trainer(), torch.randn(2, 1, 256) * 0.1
    # Before the step: its copies share no state with it.
    generator, discriminator = (copy.deepcopy(n) for n in (ours.generator, ours.discriminator))
    g_loss, d_loss, mel = ours.step(real)
    fake = generator(ours.mel(real))
    judged = discriminator(torch.cat([real, fake.detach()]))
    logits = [features[-1].chunk(2) for features in judged]
    want = sum((1 - r).square().mean() + f.square().mean() for r, f in logits)
    torch.testing.assert_close(d_loss, want.detach())
    want.backward()
    optimizer = torch.optim.AdamW(discriminator.parameters(), 2e-4, (0.8, 0.99))
    optimizer.step()
    for name, moved in ours.discriminator.named_parameters():
        torch.testing.assert_close(
            moved, dict(discriminator.named_parameters())[name], msg=name, rtol=1e-3, atol=2e-6
        )
    of_real, of_fake = discriminator(real), discriminator(fake)
    distance = sum(
        F.l1_loss(f, r)
        for features in zip(of_fake, of_real, strict=True)
        for f, r in zip(*features, strict=True)
    )
    compared = MelSpectrogram(replace(MEL, fmax=None))
    spectral = F.l1_loss(compared(fake), compared(real))
    adversarial = sum((1 - features[-1]).square().mean() for features in of_fake)
    torch.testing.assert_close(mel, spectral.detach())
    torch.testing.assert_close(
        g_loss, (adversarial + 2 * distance + 45 * spectral).detach(), rtol=1e-3, atol=1e-3
    )


def test_it_learns():
    of = trainer(replace(RECIPE, lr=2e-3))
    first, last = losses(of)[0], losses(of, epochs=10)[-1]
    assert last[-1] < 0.7 * first[-1]
    assert of.skipped == 0


def test_the_rate_falls_with_every_epoch():
    of = trainer(replace(RECIPE, lr_decay=0.5))
    losses(of, epochs=3)
    assert [o.param_groups[0]["lr"] for o in (of.g_optimizer, of.d_optimizer)] == [5e-5, 5e-5]


@pytest.mark.parametrize(
    "recipe", [RECIPE, replace(RECIPE, ema_decay=0.99, bf16=True)], ids=["", "average, bfloat16"]
)
def test_it_goes_on_to_the_bit(tmp_path, recipe):
    unbroken = trainer(recipe)
    whole = losses(unbroken, epochs=3)
    interrupted = trainer(recipe)
    before = losses(interrupted, epochs=3, until=3)
    save_checkpoint(tmp_path / "checkpoint.pt", interrupted.state_dict())
    resumed = trainer(recipe, seed=5)
    resumed.load_state_dict(load_checkpoint(tmp_path / "checkpoint.pt"))
    assert before + losses(resumed, epochs=3) == whole
    for name, tensor in unbroken.average.state_dict().items():
        assert torch.equal(tensor, resumed.average.state_dict()[name])
    with pytest.raises(ValueError, match="recipe must be that of the checkpoint, mel_weight"):
        trainer(replace(recipe, mel_weight=15.0)).load_state_dict(interrupted.state_dict())


def test_a_step_that_is_not_finite_changes_nothing():
    of = trainer(replace(RECIPE, ema_decay=0.9))
    real = torch.randn(2, 1, 256) * 0.1
    of.step(real)
    networks = (of.generator, of.average, of.discriminator)
    before = [[p.clone() for p in n.parameters()] for n in networks]
    real[0, 0, 7] = float("nan")
    of.step(real)
    assert of.skipped == 2
    for network, parameters in zip(networks, before, strict=True):
        assert all(map(torch.equal, network.parameters(), parameters))
    assert all(x.isfinite() for x in of.step(torch.randn(2, 1, 256)))


def test_wrong_arguments_are_refused():
    for changes, message in (
        (dict(segment=0), "segment must be at least 1"),
        (dict(mel_weight=-1.0), "mel_weight must be at least 0"),
        (dict(lr_decay=1.5), r"lr_decay must be in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            VocoderRecipe(**changes)
    with pytest.raises(ValueError, match="segment must be a multiple of the hop of mel, 16"):
        trainer(VocoderRecipe(segment=250))
    with pytest.raises(ValueError, match="and at least 25, got 16"):
        trainer(VocoderRecipe(segment=16))
    with pytest.raises(ValueError, match="windows of two segments, 512"):
        next(trainer().train(torch.zeros(4, 100, dtype=torch.int16), epochs=1, batch_size=2))
