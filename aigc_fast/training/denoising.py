"""What a diffusion model is asked for in training: noise levels, targets, weights."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aigc_fast.ops._checks import check_choice
from aigc_fast.schedulers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, Scheduler

#: What the model may predict, and the schedulers' name of it.
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "flow": "flow_prediction"}
#: Noise schedules of epsilon and v, and the schedulers' name of them.
SCHEDULES = {"cosine": "squaredcos_cap_v2", "linear": "linear"}
WEIGHTINGS = ("min_snr", "p2")


@dataclass(frozen=True)
class Denoising:
    """What a model of (noisy, timesteps) predicts, where noisy = alpha * sample + sigma * noise.

    prediction: epsilon  the noise
                v        alpha * noise - sigma * sample: where hardly any signal is left this is
                         nearly the sample, while the noise would be nearly a copy of the input
                         (arXiv:2202.00512)
                flow     noise - sample, with alpha = 1 - sigma and the timestep 1000 sigma, any
                         real number: rectified flow (arXiv:2209.03003)
    schedule:   of epsilon and v, over 1000 timesteps: cosine (arXiv:2102.09672) or linear
                (arXiv:2006.11239).
    weighting:  of the squared error of each sample; None for 1. The others are factors on the
                squared error of the noise, by the signal-to-noise ratio alpha^2 / sigma^2:
                min_snr  min(snr, 5) / snr (arXiv:2303.09556)
                p2       1 / (1 + snr) (arXiv:2204.00227)

    Raises ValueError for another word.
    """

    prediction: str = "v"
    schedule: str = "cosine"
    weighting: str | None = None

    def __post_init__(self) -> None:
        check_choice("prediction", self.prediction, PREDICTIONS)
        check_choice("schedule", self.schedule, SCHEDULES)
        if self.weighting is not None:
            check_choice("weighting", self.weighting, WEIGHTINGS)

    def scheduler(self) -> Scheduler:
        """A scheduler with the noise levels of this task."""
        if self.prediction == "flow":
            return FlowMatchEulerDiscreteScheduler()
        return DDPMScheduler(
            beta_schedule=SCHEDULES[self.schedule], prediction_type=PREDICTIONS[self.prediction]
        )

    def draw_timesteps(self, batch: int, generator: torch.Generator) -> Tensor:
        """Evenly over the noise levels, (batch,) on the generator's device."""
        draw: dict[str, Any] = {"generator": generator, "device": generator.device}
        if self.prediction == "flow":
            return 1000 * torch.rand(batch, **draw)
        return torch.randint(1000, (batch,), **draw)

    def weights(self, alpha: Tensor, sigma: Tensor) -> Tensor | None:
        """(batch,): factors of the squared errors at these noise levels, or None for 1."""
        if self.weighting is None:
            return None
        snr = (alpha / sigma).square()
        weights = (5 / snr).clamp(max=1) if self.weighting == "min_snr" else 1 / (1 + snr)
        # Both velocities err 1 / alpha times as much as the noise that follows from them.
        return weights if self.prediction == "epsilon" else alpha.square() * weights
