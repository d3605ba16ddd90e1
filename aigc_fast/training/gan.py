"""Adversarial training: any loss with any penalty, one trainer for all of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from aigc_fast._graphs import Replay, check_graph
from aigc_fast.io.token_ids import integer
from aigc_fast.ops import discriminator_loss, generator_loss
from aigc_fast.ops._checks import check_positive

from .ema import EMA
from .gan_recipe import GANRecipe
from .optim import Adam
from .penalties import gradient_penalty, path_length_penalty, r1_penalty, r2_penalty
from .statistics import keep_statistics
from .trainer import Trainer, recipe_or_default


class GANStep(NamedTuple):
    """Where training stands after a step. The losses stay on the device until they are read."""

    epoch: int
    epochs: int
    step: int
    steps: int
    g_loss: Tensor
    d_loss: Tensor

    def __str__(self) -> str:
        return (
            f"Epoch [{self.epoch}/{self.epochs}], Step [{self.step}/{self.steps}], "
            f"G Loss: {self.g_loss.item():.4f}, D Loss: {self.d_loss.item():.4f}"
        )


class GANTrainer(Trainer):
    """Trains a generator (latents to samples) against a discriminator (samples to logits).

    A step is a batch of real samples: an update of the discriminator and, every n_critic steps, of
    the generator. Networks of `num_classes` are called with labels as well. A step whose loss or
    gradients are not finite leaves weights, their averages and the optimizer as they are and is
    counted in `skipped`; the running statistics of batch norms have moved by then, unless they are
    not finite. Parameters that require no gradient when the trainer is made are not trained.

    recipe:  what is minimised; by default the non-saturating loss and numbers of DCGAN
        (arXiv:1406.2661, arXiv:1511.06434).
    done:    done(step) is the share of the training, 0 to 1, that is done by a step, such as
        `lambda step: step / 1000`; for recipes whose learning rates fall.
    seed:    of latents, noise and the order of samples. The same seed gives the same losses, to the
        bit, also where training was interrupted and resumed from `state_dict`.
    cuda_graph: whether a step is one CUDA graph, from the third step of its kind on (with or
        without the generator, with or without the penalty) and for each shape of a batch. The
        networks must then not wait for the device in `forward`, and their parameters must stay the
        tensors that they are. That the step can be recorded is tested on the CPU, by replaying the
        operators that it calls; the recording itself has not run on a GPU yet.
    average: the generator with averaged weights, the one to sample from.

    Raises ValueError for cuda_graph on a CPU; RuntimeError from `step` where the device cannot
    record the networks.
    """

    ema: EMA

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        latent_dim: int,
        recipe: GANRecipe | None = None,
        *,
        done: Callable[[int], float] = lambda step: 0.0,
        seed: int = 0,
        cuda_graph: bool = False,
    ) -> None:
        recipe = recipe_or_default(recipe, GANRecipe)
        check_positive(latent_dim=integer("latent_dim", latent_dim))
        lacking = [n for n in ("map", "synthesize", "num_styles") if not hasattr(generator, n)]
        if recipe.path_length_weight and lacking:
            raise ValueError(
                "path_length_weight must be 0 for a generator without styles, got "
                f"{recipe.path_length_weight} for {type(generator).__name__}, which has no "
                f"{', '.join(lacking)}"
            )
        self.generator, self.discriminator, self.latent_dim = generator, discriminator, latent_dim
        self.g_parameters = [p for p in generator.parameters() if p.requires_grad]
        self.d_parameters = [p for p in discriminator.parameters() if p.requires_grad]
        ema = EMA(generator, recipe.ema_decay)
        self.g_optimizer = Adam(
            self.g_parameters, recipe.g_lr, recipe.betas, max_norm=recipe.max_norm, average=ema
        )
        self.d_optimizer = Adam(
            self.d_parameters, recipe.d_lr, recipe.betas, max_norm=recipe.max_norm
        )
        super().__init__(
            recipe,
            {"generator": generator, "discriminator": discriminator},
            {"g_optimizer": self.g_optimizer, "d_optimizer": self.d_optimizer},
            ema,
            done,
            seed,
        )
        # Real and fake in one batch: half as many matrix products, each twice as large. Not where a
        # batch norm would mix them: it tells them apart by their statistics.
        self._jointly = not any(isinstance(m, _BatchNorm) for m in discriminator.modules())
        self.g_loss = torch.zeros((), device=self.device)
        #: of the paths of the generator, a moving average
        self.path_length = torch.zeros((), device=self.device)
        check_graph(cuda_graph, self.device)
        self._records = cuda_graph
        self._record()

    def _record(self) -> None:
        self._graph = Replay(self._update, self.device, [self.random]) if self._records else None

    def latents(self, batch_size: int) -> Tensor:
        """Standard normal (batch_size, latent_dim), the next ones of the trainer's seed."""
        like = self.g_parameters[0]
        return like.new_empty(batch_size, self.latent_dim).normal_(generator=self.random)

    def step(self, real: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One step on a batch of real samples; returns (g_loss, d_loss), penalties not included.

        labels: of the real samples; the generated ones get the same.
        """
        recipe = self.recipe
        of_generator = self.steps_done % recipe.n_critic == 0
        penalised = recipe.penalty is not None and self.steps_done % recipe.penalty_interval == 0
        updates = self.steps_done // recipe.n_critic
        bounded = updates % recipe.path_length_interval == 0 and recipe.path_length_weight > 0
        kind = of_generator, penalised, of_generator and bounded
        self._set_learning_rates()
        if self._graph is None:
            d_loss, *g_loss = self._update(real, labels, None, *kind)
        else:
            (g,), (d,) = self.g_optimizer.param_groups, self.d_optimizer.param_groups
            rates = [[g["lr"], self.ema.next_decay()], [d["lr"], 0.0]]
            d_loss, *g_loss = self._graph(
                real, labels, torch.tensor(rates, dtype=torch.float64), *kind
            )
            self.ema.updates += of_generator
        if g_loss:
            [self.g_loss] = g_loss
        self.steps_done += 1
        return self.g_loss, d_loss

    def _set_learning_rates(self) -> None:
        recipe = self.recipe
        done, start = self.share_done, recipe.lr_falls_from
        factor = 1.0 if done <= start else (1.0 - done) / (1.0 - start)
        for optimizer, lr in ((self.g_optimizer, recipe.g_lr), (self.d_optimizer, recipe.d_lr)):
            for group in optimizer.param_groups:
                group["lr"] = lr * factor

    def _update(
        self,
        real: Tensor,
        labels: Tensor | None,
        rates: Tensor | None,
        of_generator: bool,
        penalised: bool,
        bounded: bool,
    ) -> tuple[Tensor, ...]:
        """A step of that kind, all that a CUDA graph holds of it: (d_loss, and maybe g_loss).

        rates: (2, 2), of the generator's and the discriminator's optimizer, as for `Adam.step`;
            None for the numbers that these hold. With them, gradients keep their memory.
        """
        restore = keep_statistics(*self.networks.values())
        with torch.set_grad_enabled(of_generator):
            fake = self._run(self.generator, self.latents(len(real)), labels)
        d_loss = self._discriminator_loss(real, fake.detach(), labels)
        total = d_loss
        if penalised:
            weight = self.recipe.penalty_weight * self.recipe.penalty_interval
            total = d_loss + weight * self._penalty(real, fake.detach(), labels)
        g_rates, d_rates = (None, None) if rates is None else rates.unbind()
        self.d_optimizer.zero_grad(set_to_none=rates is None)
        total.backward(inputs=self.d_parameters)
        self.d_optimizer.step(loss=total, rates=d_rates)
        if self.recipe.weight_clip is not None:
            with torch.no_grad():
                for parameter in self.d_parameters:
                    parameter.clamp_(-self.recipe.weight_clip, self.recipe.weight_clip)
        if not of_generator:
            restore()
            return (d_loss.detach(),)
        fake_logits = self._judge(fake, labels)
        paired = self.recipe.loss == "relativistic"
        with torch.no_grad():
            real_logits = self._judge(real, labels) if paired else None
        g_loss = generator_loss(fake_logits, real_logits, self.recipe.loss)
        total = g_loss
        if bounded:
            weight = self.recipe.path_length_weight * self.recipe.path_length_interval
            total = g_loss + weight * self._path_length_penalty(len(real), labels)
        self.g_optimizer.zero_grad(set_to_none=rates is None)
        # The discriminator's own gradients are not wanted here, so they are not computed.
        total.backward(inputs=self.g_parameters)
        restore()
        self.ema.update_buffers(self.generator, None if g_rates is None else g_rates[1])
        self.g_optimizer.step(loss=total, rates=g_rates)  # moves the averaged weights too
        return d_loss.detach(), g_loss.detach()

    def _discriminator_loss(self, real: Tensor, fake: Tensor, labels: Tensor | None) -> Tensor:
        if self._jointly:
            both = None if labels is None else torch.cat([labels, labels])
            real_logits, fake_logits = self._judge(torch.cat([real, fake]), both).split(len(real))
        else:
            real_logits, fake_logits = self._judge(real, labels), self._judge(fake, labels)
        return discriminator_loss(real_logits, fake_logits, self.recipe.loss)

    def _penalty(self, real: Tensor, fake: Tensor, labels: Tensor | None) -> Tensor:
        if self.recipe.penalty == "gradient":
            return gradient_penalty(self._judge, real, fake, labels, generator=self.random)
        terms = [
            penalty(self._judge, samples, labels)
            for name, penalty, samples in (("r1", r1_penalty, real), ("r2", r2_penalty, fake))
            if name in str(self.recipe.penalty).split("+")
        ]
        return sum(terms[1:], terms[0])

    def _path_length_penalty(self, batch_size: int, labels: Tensor | None) -> Tensor:
        """With respect to the styles of new latents, half a batch of them as in the paper."""
        generator: Any = self.generator
        count = (batch_size + 1) // 2
        some = None if labels is None else labels[:count]
        w = self._run(generator.map, self.latents(count), some)
        styles = w.unsqueeze(1).repeat(1, generator.num_styles, 1)
        images = self._run(generator.synthesize, styles, None)
        return path_length_penalty(images, styles, self.path_length, generator=self.random)

    def _run_step(self, place: tuple[int, int, int, int], batch: tuple[Tensor, ...]) -> GANStep:
        return GANStep(*place, *self.step(*batch))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "g_loss": self.g_loss, "path_length": self.path_length}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.g_loss = state["g_loss"].to(self.device)
        self.path_length.copy_(state.get("path_length", torch.zeros(())))  # older ones have none
        self._record()  # the optimizers have other tensors now

    def _run(self, network: Callable[..., Tensor], x: Tensor, labels: Tensor | None) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.bf16):
            y = network(x) if labels is None else network(x, labels)
        return y.float() if self.recipe.bf16 else y

    def _judge(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.recipe.instance_noise:
            noise = torch.empty_like(samples).normal_(generator=self.random)
            samples = torch.add(samples, noise, alpha=self.recipe.instance_noise)
        return self._run(self.discriminator, samples, labels)
