"""What all trainers share: the loop over batches, averaged weights, and a state to go on from."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from aigc_fast.ops._checks import check_class

from .batches import as_floats, epochs_of_batches, steps_of_epoch
from .ema import EMA
from .optim import Adam

Recipe = TypeVar("Recipe")


class Trainer(ABC):
    """A loop over batches that can be interrupted and resumed; subclasses add the step.

    recipe:     a dataclass: what is minimised, and how.
    networks, optimizers: what a step changes, by the names that `state_dict` gives them.
    ema:        the averaged weights, of the network to sample from; None for that network's own.
    done:       done(step) is the share of the training, 0 to 1, that is done by a step.
    seed:       of everything random. The same seed gives the same losses, to the bit, also where
                training was interrupted and resumed from `state_dict`.
    """

    def __init__(
        self,
        recipe: Any,
        networks: dict[str, nn.Module],
        optimizers: dict[str, Adam],
        ema: EMA | None,
        done: Callable[[int], float],
        seed: int,
    ) -> None:
        self.recipe, self.networks, self.optimizers, self.ema = recipe, networks, optimizers, ema
        self.done, self.seed, self.steps_done = done, seed, 0
        self.device = next(self.average.parameters()).device
        self.random = torch.Generator(self.device).manual_seed(seed)

    @property
    def average(self) -> nn.Module:
        return next(iter(self.networks.values())) if self.ema is None else self.ema.model

    @property
    def skipped(self) -> int:
        """Updates that were left out because something was not finite."""
        return sum(int(optimizer.skipped) for optimizer in self.optimizers.values())

    @property
    def share_done(self) -> float:
        return min(self.done(self.steps_done), 1.0)

    @abstractmethod
    def _run_step(self, place: tuple[int, int, int, int], batch: tuple[Tensor, ...]) -> Any:
        """A step at (epoch, epochs, step, steps), counted from 1; what `train` yields of it."""

    def train(
        self, samples: Tensor, labels: Tensor | None = None, *, epochs: int, batch_size: int
    ) -> Iterator[Any]:
        """Yields after every step, so that the caller can log, plot or stop. Resumes after
        `steps_done`.

        samples: (count, ...) as the networks take them, or uint8 pixels, a quarter of the memory,
                 which become numbers in [-1, 1] a batch at a time.
        labels:  int64 (count,), for networks of classes.
        epochs:  passes over the samples, those already done included.
        batch_size: samples of a step; those that do not fill a batch are left out of the epoch.
        """
        data = (samples,) if labels is None else (samples, labels)
        steps = steps_of_epoch(len(samples), batch_size)
        for epoch, step, (batch, *classes) in epochs_of_batches(
            *data, batch_size=batch_size, epochs=epochs, seed=self.seed, done=self.steps_done
        ):
            yield self._run_step((epoch, epochs, step, steps), (as_floats(batch), *classes))

    def _parts(self) -> dict[str, Any]:
        averages = {} if self.ema is None else {"average": self.average}
        return {**self.networks, **averages, **self.optimizers}

    def state_dict(self) -> dict[str, Any]:
        """All that training needs to go on as if it had not been interrupted."""
        return {
            "recipe": asdict(self.recipe),
            **{name: part.state_dict() for name, part in self._parts().items()},
            "average_updates": self.ema.updates if self.ema else 0,
            "skipped": [optimizer.skipped for optimizer in self.optimizers.values()],
            "random": self.random.get_state(),
            "torch_random": self._torch_random(),
            "seed": self.seed,
            "steps_done": self.steps_done,
        }

    def _torch_random(self) -> dict[str, Tensor]:
        """Of torch's own generators: a network may draw from them, for noise or dropout."""
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave, the state of torch's own generators included.

        Raises ValueError for the state of another recipe.
        """
        # An older checkpoint lacks what was added since, whose default is what was done before.
        recipe, other = asdict(self.recipe), asdict(type(self.recipe)()) | state["recipe"]
        if differing := sorted(name for name in recipe if recipe[name] != other[name]):
            raise ValueError(
                f"recipe must be that of the checkpoint, {', '.join(differing)} differ"
            )
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        if self.ema:
            self.ema.updates = state["average_updates"]
        for optimizer, count in zip(self.optimizers.values(), state["skipped"], strict=True):
            optimizer.skipped.copy_(count)
        self.random.set_state(state["random"].cpu())
        if "torch_random" in state:  # older checkpoints have none
            torch.set_rng_state(state["torch_random"]["cpu"].cpu())
            if "cuda" in state["torch_random"] and self.device.type == "cuda":
                torch.cuda.set_rng_state(state["torch_random"]["cuda"].cpu(), self.device)
        self.seed, self.steps_done = state["seed"], state["steps_done"]


def recipe_or_default(recipe: Recipe | None, wanted: type[Recipe]) -> Recipe:
    """The recipe, or that class with its defaults for None; TypeError for what is none."""
    if recipe is None:
        return wanted()
    check_class("recipe", recipe, wanted)
    return recipe


def check_not_negative(recipe: Any, *names: str) -> None:
    """ValueError unless these numbers of a recipe are at least 0, and finite."""
    for name in names:
        if not 0 <= getattr(recipe, name) < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite, got {getattr(recipe, name)}")


def check_share(recipe: Any, name: str) -> None:
    """ValueError unless this number of a recipe is from 0 to 1."""
    if not 0 <= getattr(recipe, name) <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {getattr(recipe, name)}")


def warm_up_and_cosine(done: float) -> float:
    """The share of the highest learning rate at that share of the training: it rises over the first
    twentieth and falls along a cosine to zero."""
    return min(1.0, 20 * done + 0.01) * (1 + math.cos(math.pi * done)) / 2
