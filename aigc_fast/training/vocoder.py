"""Training of vocoders: adversarial, with features and mel spectrograms to match."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import cached

from aigc_fast.models.vocoder import MelSpectrogram
from aigc_fast.ops import discriminator_loss, generator_loss
from aigc_fast.ops._checks import check_positive

from .ema import EMA
from .optim import AdamW
from .trainer import Trainer, check_not_negative, check_share, recipe_or_default


@dataclass(frozen=True)
class VocoderRecipe:
    """How a vocoder is trained; by default as HiFi-GAN's authors do. What the generator minimises
    is its least-squares loss + feature_weight * distance of features + mel_weight * distance of
    mel spectrograms, distances being means of absolute differences.

    segment:    samples of a waveform that a step hears.
    feature_weight, mel_weight: factors, as above.
    lr, betas, weight_decay: of both AdamW optimizers.
    lr_decay:   what an epoch leaves of the learning rate, 0 to 1. An epoch of `segments_of` hears
                all there is; the authors' hears one segment of each utterance.
    max_norm:   the norm that gradients are clipped to; None for no clipping (BigVGAN: 1000).
    ema_decay:  of averaged weights of the generator, less in the first steps; None for none.
    bf16:       run the networks under bfloat16 autocast; weights and losses stay as they are.
    """

    segment: int = 8192
    feature_weight: float = 2.0
    mel_weight: float = 45.0
    lr: float = 2e-4
    betas: tuple[float, float] = (0.8, 0.99)
    weight_decay: float = 0.01
    lr_decay: float = 0.999
    max_norm: float | None = None
    ema_decay: float | None = None
    bf16: bool = False

    def __post_init__(self) -> None:
        check_positive(segment=self.segment)
        check_not_negative(self, "feature_weight", "mel_weight", "lr", "weight_decay")
        check_share(self, "lr_decay")


class VocoderStep(NamedTuple):
    """Where training stands after a step: what generator and discriminator minimise, and of the
    former the distance of mel spectrograms. They stay on the device until they are read."""

    epoch: int
    epochs: int
    step: int
    steps: int
    g_loss: Tensor
    d_loss: Tensor
    mel: Tensor

    def __str__(self) -> str:
        return (
            f"Epoch [{self.epoch}/{self.epochs}], Step [{self.step}/{self.steps}], "
            f"G Loss: {self.g_loss.item():.4f}, D Loss: {self.d_loss.item():.4f}, "
            f"Mel: {self.mel.item():.4f}"
        )


class VocoderTrainer(Trainer):
    """Trains a generator (mel spectrograms to waveforms) against discriminators.

    A step whose loss or gradients are not finite leaves weights, their averages and the optimizer
    as they are and is counted in `skipped`.

    generator:     (batch, num_mels, frames) to (batch, 1, samples), such as HiFiGANGenerator, with
                   `weight_norm` of models.vocoder where it is trained as published.
    discriminator: (batch, 1, samples) to a list for each of its parts, of features and at the end
                   logits: VocoderDiscriminator.
    mel:           makes the spectrograms that the generator reads; those that are compared reach
                   up to half the sampling rate.
    recipe:        what is minimised, and how.
    seed:          of segments and their order. The same seed gives the same losses, to the bit,
                   also where training was interrupted and resumed from `state_dict`.
    average:       the generator to listen to: with averaged weights where the recipe has them.

    `train` takes what `segments_of` gives. Raises ValueError where segment is no whole number of
    frames, or too short for one.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        mel: MelSpectrogram,
        recipe: VocoderRecipe | None = None,
        *,
        seed: int = 0,
    ) -> None:
        recipe = recipe_or_default(recipe, VocoderRecipe)
        hop, least = mel.config.hop_size, mel.config.least
        if recipe.segment % hop or recipe.segment < least:
            raise ValueError(
                f"segment must be a multiple of the hop of mel, {hop}, and at least {least}, got "
                f"{recipe.segment}"
            )
        self.generator, self.discriminator = generator, discriminator
        ema = None if recipe.ema_decay is None else EMA(generator, recipe.ema_decay)
        self.g_parameters, self.d_parameters = (
            [p for p in network.parameters() if p.requires_grad]
            for network in (generator, discriminator)
        )
        self.g_optimizer, self.d_optimizer = (
            AdamW(
                parameters, recipe.lr, recipe.betas, weight_decay=recipe.weight_decay,
                max_norm=recipe.max_norm, average=average,
            )
            for parameters, average in ((self.g_parameters, ema), (self.d_parameters, None))
        )  # fmt: skip
        super().__init__(
            recipe,
            {"generator": generator, "discriminator": discriminator},
            {"g_optimizer": self.g_optimizer, "d_optimizer": self.d_optimizer},
            ema,
            lambda step: 0.0,  # nothing here depends on the share that is done
            seed,
        )
        self.mel = mel.to(self.device)
        self.compared = MelSpectrogram(replace(mel.config, fmax=None)).to(self.device)

    def step(self, real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step on waveforms (batch, 1, segment) in [-1, 1]; returns (g_loss, d_loss, mel)."""
        fake = self._generate(self.mel(real))
        d_loss = self._discriminator_loss(real, fake.detach())
        self.d_optimizer.zero_grad()
        d_loss.backward(inputs=self.d_parameters)
        self.d_optimizer.step(loss=d_loss)
        g_loss, mel = self._generator_loss(real, fake)
        self.g_optimizer.zero_grad()
        # The discriminator's own gradients are not wanted here, so they are not computed.
        g_loss.backward(inputs=self.g_parameters)
        if self.ema:
            self.ema.update_buffers(self.generator)
        self.g_optimizer.step(loss=g_loss)  # moves the averaged weights too
        self.steps_done += 1
        return g_loss.detach(), d_loss.detach(), mel.detach()

    def _generate(self, mel: Tensor) -> Tensor:
        # A convolution reads its weight more than once: weight norm computes it then once.
        with cached(), self._autocast():
            return self.generator(mel).float()

    def _discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        with self._autocast():  # in one batch: half as many products, each twice as large
            found = self.discriminator(torch.cat([real, fake]))
        logits = [features[-1].float().split(len(real)) for features in found]
        return _total([2 * discriminator_loss(r, f, "least_squares") for r, f in logits])

    def _generator_loss(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """(all that the generator minimises, the distance of spectrograms)."""
        recipe = self.recipe
        # Weights are normalised once, and where no gradient reaches them, as none is wanted.
        with cached(), self._autocast():
            with torch.no_grad():
                wanted = self.discriminator(real)
            found = self.discriminator(fake)
        adversarial = [2 * generator_loss(f[-1].float(), loss="least_squares") for f in found]
        distances = [
            F.l1_loss(f.float(), w.float())
            for features in zip(found, wanted, strict=True)
            for f, w in zip(*features, strict=True)
        ]
        mel = F.l1_loss(self.compared(fake), self.compared(real))
        total = _total(adversarial) + recipe.feature_weight * _total(distances)
        return total + recipe.mel_weight * mel, mel

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.bf16)

    def _run_step(self, place: tuple[int, int, int, int], batch: tuple[Tensor, ...]) -> VocoderStep:
        for optimizer in (self.g_optimizer, self.d_optimizer):
            for group in optimizer.param_groups:
                group["lr"] = self.recipe.lr * self.recipe.lr_decay ** (place[0] - 1)
        return VocoderStep(*place, *self.step(self._cut(batch[0])))

    def _cut(self, windows: Tensor) -> Tensor:
        """A segment from a random place of each window."""
        segment, device = self.recipe.segment, self.device
        if windows.dim() != 2 or windows.shape[1] != 2 * segment:
            raise ValueError(
                f"samples must be windows of two segments, {2 * segment}, got "
                f"{tuple(windows.shape)}"
            )
        first = torch.randint(segment, (len(windows), 1), generator=self.random, device=device)
        chosen = windows.gather(1, first + torch.arange(segment, device=device))
        return chosen[:, None].float() / 32768


def segments_of(waveforms: Sequence[Tensor], segment: int) -> Tensor:
    """Windows of two segments that begin a segment apart, int16 (count, 2 * segment): a random
    segment of a random one begins anywhere in the waveforms, each place as likely.

    waveforms: int16 (samples,), as loud as they are: HiFi-GAN's authors scale each to a peak of
               0.95. Each gets zeros at its end, up to a whole number of segments and to at least
               two of them.
    """
    windows = []
    for waveform in waveforms:
        length = max(2, -(-len(waveform) // segment)) * segment
        windows.append(F.pad(waveform, (0, length - len(waveform))).unfold(0, 2 * segment, segment))
    return torch.cat(windows)


def _total(terms: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum()
