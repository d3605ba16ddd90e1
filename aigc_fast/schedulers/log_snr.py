"""What the solvers in the half log-SNR share: its levels, their models' predictions, schedules."""

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from aigc_fast.ops._checks import check_choice
from aigc_fast.schedulers.diffusion_scheduler import SigmaScheduler
from aigc_fast.schedulers.euler import denoised
from aigc_fast.schedulers.linear import OUTPUT, SAMPLE, X0, Form, predictions
from aigc_fast.schedulers.schedule import shift_sigmas, sigma_to_timestep, space_timesteps


class Levels(NamedTuple):
    """alpha, sigma and the half log-SNR at each of sigmas, the last one included."""

    alpha: Tensor
    sigma: Tensor
    lam: Tensor

    def at(self, shift: int) -> "Levels":
        """Of step i, those at i + shift. For shift < 0 the first steps have none."""
        return Levels(*torch.stack(self).roll(-shift, 1)[:, :-1])


def is_edm(s: Any) -> bool:
    """Whether the model is preconditioned as by Karras et al., its samples x0 + sigma * epsilon."""
    return hasattr(s.config, "sigma_data")


def levels_of(s: Any) -> Levels:
    """alpha, sigma and log(alpha / sigma) at every sigma of the schedule."""
    sigma = s.sigmas.cpu()
    if is_edm(s):
        alpha = torch.ones_like(sigma)
    elif getattr(s.config, "use_flow_sigmas", False):
        alpha = 1 - sigma
    else:
        alpha = 1 / (sigma**2 + 1) ** 0.5
        sigma = sigma * alpha
    return Levels(alpha, sigma, torch.log(alpha) - torch.log(sigma))


def converted(s: Any, now: Levels) -> tuple[Form, Form]:
    """x0 and epsilon of the model's output at the levels of the steps."""
    if is_edm(s):
        x0 = denoised(s, now.sigma)
        return x0, (SAMPLE - x0) / now.sigma
    kind = s.config.prediction_type
    if kind != "flow_prediction":
        return predictions(kind, now.alpha, now.sigma)
    x0 = SAMPLE - s.sigmas.cpu()[:-1] * OUTPUT
    return x0, (SAMPLE - now.alpha * x0) / now.sigma


def epsilon_kept(s: Any, now: Levels) -> Form:
    """epsilon, of the thresholded x0 where there is thresholding."""
    if getattr(s.config, "thresholding", False):
        return (SAMPLE - now.alpha * X0) / now.sigma
    return converted(s, now)[1]


def without_variance(s: Any, sample: Tensor, output: Tensor) -> Tensor:
    """The prediction alone, of a model that predicts a variance too: its first three channels."""
    if output.shape == sample.shape:
        return output
    learned = getattr(s.config, "variance_type", None) in ("learned", "learned_range")
    return output[:, :3] if learned else output


# ---- the schedules ------------------------------------------------------------------------------


@dataclass
class LambdaScheduler(SigmaScheduler):
    """The schedules of the solvers in log-SNR, with thresholding and flow sigmas.

    lambda_min_clipped: leaves out timesteps with less log-SNR / 2; needed by squaredcos_cap_v2.
    use_flow_sigmas: sigma is the share of noise of flow matching, shifted by flow_shift.
    """

    _: KW_ONLY
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    lower_order_final: bool = True
    use_flow_sigmas: bool = False
    flow_shift: float = 1.0

    predictions: ClassVar = ("epsilon", "sample", "v_prediction", "flow_prediction")
    lambda_min_clipped: ClassVar[float] = -math.inf
    rounds_karras: ClassVar[bool] = True

    @property
    def kept(self) -> int:
        """How many outputs the solver keeps."""
        return self.solver_order  # type: ignore[attr-defined]

    def forget(self) -> None:
        self.model_outputs: list[Any] = [None] * self.kept
        self.lower_order_nums = 0

    def last_timestep(self) -> int:
        alpha, sigma = super().training_levels()
        half_log_snr = torch.log(alpha) - torch.log(sigma)
        clipped = torch.searchsorted(half_log_snr.flip(0), self.lambda_min_clipped)
        return self.num_train_timesteps - int(clipped)

    def shift_of(self, mu: float | None) -> float:
        if mu is None:
            return self.flow_shift
        dynamic = getattr(self, "use_dynamic_shifting", False)
        if not (dynamic and self.time_shift_type == "exponential"):  # type: ignore[attr-defined]
            raise AssertionError("mu is for use_dynamic_shifting with time_shift_type exponential")
        return math.exp(mu)

    def lay_out(self, steps: int | None, timesteps: Any = None, mu: float | None = None) -> None:
        train, shift = self.train_sigmas(), self.shift_of(mu)
        kind = self.spacing()
        lu = getattr(self, "use_lu_lambdas", False)
        if timesteps is not None:
            if kind or lu:
                raise ValueError(f"timesteps cannot be given with {kind or 'lu'} sigmas")
            timesteps = np.array(timesteps).astype(np.int64)
            steps = len(timesteps)
        else:
            timesteps = space_timesteps(
                self.timestep_spacing, self.num_train_timesteps, steps, self.steps_offset,
                last=self.last_timestep(), one_more=True,
            )  # fmt: skip
        assert steps is not None
        if kind or lu:
            if lu:
                ends = np.log(train)
                sigmas = np.exp(np.linspace(ends[-1].item(), ends[0].item(), steps))
            else:
                sigmas = self.respaced(train[::-1], steps)  # type: ignore[assignment]
            timesteps = sigma_to_timestep(sigmas, train)
            if (lu or kind == "karras") and self.rounds_karras:
                timesteps = timesteps.round()
        elif self.use_flow_sigmas:
            sigmas = self.flow_sigmas(steps, shift)
            timesteps = sigmas * self.num_train_timesteps
        else:
            sigmas = np.interp(timesteps, np.arange(len(train)), train)
        spaced = bool(kind or lu or self.use_flow_sigmas)
        values = np.append(sigmas, self.last_sigma(sigmas, spaced)).astype(np.float32)
        self.num_inference_steps = len(timesteps)
        self.sigmas = torch.from_numpy(values)
        self.timesteps = torch.from_numpy(timesteps.astype(np.int64))

    def flow_sigmas(self, steps: int, shift: float) -> np.ndarray:
        rising = 1.0 - np.linspace(1, 1 / self.num_train_timesteps, steps + 1)
        return shift_sigmas(rising, shift)[:0:-1]

    def last_sigma(self, sigmas: np.ndarray, spaced: bool) -> float:
        """The sigma behind the last step."""
        return sigmas[-1] if spaced else self.train_sigmas()[0]


@dataclass
class FinalSigma(LambdaScheduler):
    """final_sigmas_type: zero, or sigma_min (the noise of timestep 0)."""

    _: KW_ONLY
    final_sigmas_type: str = "zero"
    use_dynamic_shifting: bool = False
    time_shift_type: str = "exponential"

    def __post_init__(self) -> None:
        check_choice("final_sigmas_type", self.final_sigmas_type, ("zero", "sigma_min"))
        super().__post_init__()

    def last_sigma(self, sigmas: np.ndarray, spaced: bool) -> float:
        return 0.0 if self.final_sigmas_type == "zero" else self.train_sigmas()[0]
