"""Training of language models on windows of tokens, and the perplexity that judges them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aigc_fast.io.token_ids import integer
from aigc_fast.ops._checks import check_positive

from .ema import EMA
from .gradient_checkpointing import checkpoint_blocks
from .optim import AdamW
from .trainer import (
    Trainer,
    check_not_negative,
    check_share,
    recipe_or_default,
    warm_up_and_cosine,
)


@dataclass(frozen=True)
class LanguageRecipe:
    """How a language model is trained. What is minimised is the cross-entropy of each token of a
    window, given those before it.

    label_smoothing, z_loss: of `ops.linear_cross_entropy`.
    lr, betas, weight_decay: of AdamW. The learning rate rises over the first twentieth of the
                training and falls along a cosine to zero. Norms and biases do not decay.
    max_norm:   the norm that gradients are clipped to; None for no clipping.
    micro_batches: parts of a batch that go through the model one after another, for one update:
                the same result, to rounding, in less memory.
    ema_decay:  of the averaged weights; less in the first steps. None for no average.
    bf16:       run the model under bfloat16 autocast; weights and losses stay as they are.
    gradient_checkpointing: keep only the inputs of the model's blocks, and compute what is inside
                them again for the gradients: a third more time, a fraction of the memory.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    max_norm: float | None = 1.0
    micro_batches: int = 1
    ema_decay: float | None = None
    bf16: bool = False
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        check_share(self, "label_smoothing")
        check_not_negative(self, "z_loss", "lr", "weight_decay")
        check_positive(micro_batches=integer("micro_batches", self.micro_batches))


class LanguageStep(NamedTuple):
    """Where training stands after a step. The loss, in nats of a token, stays on the device until
    it is read."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: Tensor

    def __str__(self) -> str:
        loss = self.loss.item()
        return (
            f"Epoch [{self.epoch}/{self.epochs}], Step [{self.step}/{self.steps}], "
            f"Loss: {loss:.4f}, Perplexity: {_exp(loss):.4g}"
        )


class LanguageTrainer(Trainer):
    """Trains a model of loss(token_ids, label_smoothing=, z_loss=), such as `DecoderLM`, on samples
    that are windows of tokens, int64 or int32 (count, seq). A step whose loss or gradients are not
    finite leaves weights, their averages and the optimizer as they are and is counted in `skipped`.

    recipe:  what is minimised, and how.
    done:    done(step) is the share of the training, 0 to 1, that is done by a step, such as
             `lambda step: step / 1000`: the learning rate depends on it.
    seed:    of the order of windows. The same seed gives the same losses, to the bit, also where
             training was interrupted and resumed from `state_dict`.
    average: the model with averaged weights, or the model itself where there are none.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: LanguageRecipe | None = None,
        *,
        done: Callable[[int], float],
        seed: int = 0,
    ) -> None:
        recipe = recipe_or_default(recipe, LanguageRecipe)
        self.model = model
        ema = None if recipe.ema_decay is None else EMA(model, recipe.ema_decay)
        if recipe.gradient_checkpointing:
            checkpoint_blocks(model)
        self.optimizer = AdamW(
            _groups(model, recipe.weight_decay), recipe.lr, recipe.betas,
            max_norm=recipe.max_norm, average=ema,
        )  # fmt: skip
        super().__init__(recipe, {"model": model}, {"optimizer": self.optimizer}, ema, done, seed)

    def step(self, windows: Tensor) -> Tensor:
        """One update on a batch; returns the loss, the mean over its tokens."""
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr * warm_up_and_cosine(self.share_done)
        self.optimizer.zero_grad()
        losses = []
        # Parts may differ by a row: each counts by its rows.
        for part in windows.tensor_split(recipe.micro_batches):
            if len(part):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.bf16):
                    loss = self.model.loss(  # type: ignore[operator]
                        part, label_smoothing=recipe.label_smoothing, z_loss=recipe.z_loss
                    )
                loss = loss * (len(part) / len(windows))
                loss.backward()
                losses.append(loss.detach())
        loss = torch.stack(losses).sum()
        self.optimizer.step(loss=loss)  # moves the averaged weights too
        self.steps_done += 1
        return loss

    def _run_step(
        self, place: tuple[int, int, int, int], batch: tuple[Tensor, ...]
    ) -> LanguageStep:
        return LanguageStep(*place, self.step(*batch))


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters of AdamW: matrices, which decay, and others, which do not."""
    weights = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in weights if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in weights if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def windows_of(tokens: Tensor, seq: int) -> Tensor:
    """One text, (count,), cut into windows side by side, (count // seq, seq); the rest is left
    out."""
    check_positive(seq=integer("seq", seq))
    if tokens.dim() != 1:
        raise ValueError(f"tokens must be (count,), got shape {tuple(tokens.shape)}")
    return tokens[: len(tokens) // seq * seq].view(-1, seq)


@torch.no_grad()
def perplexity(model: Any, windows: Tensor, *, batch_size: int = 1) -> float:
    """exp of the mean negative log-probability of the tokens of each window after its first, given
    those before it in the window; inf where that is too much for a float.

    model:   of loss(token_ids, reduction="sum"), such as `DecoderLM`.
    windows: int64 or int32 (count, seq).
    """
    if windows.dim() != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(
            "windows must be (count, seq), at least one of at least 2 tokens, "
            f"got shape {tuple(windows.shape)}"
        )
    total = sum(model.loss(part, reduction="sum").double() for part in windows.split(batch_size))
    return _exp(float(total) / (windows.shape[0] * (windows.shape[1] - 1)))


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 or math.isnan(nats) else math.inf
