"""What schedulers share whose noise levels of training come from betas."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from aigc_fast.ops._checks import check_choice
from aigc_fast.schedulers.schedule import (
    make_betas,
    noise_to_signal,
    rescale_zero_terminal_snr,
    respace,
)
from aigc_fast.schedulers.scheduler import Scheduler
from aigc_fast.schedulers.tables import plainly, version_of


@dataclass
class DiffusionScheduler(Scheduler):
    """Schedules that begin as betas: alphas_cumprod, and x_t = alpha x_0 + sigma epsilon."""

    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: Sequence[float] | None = None
    _: KW_ONLY
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0

    predictions: ClassVar[tuple[str, ...]] = ("epsilon", "sample", "v_prediction")

    @plainly()
    def __post_init__(self) -> None:
        check_choice("prediction_type", self.prediction_type, self.predictions)
        check_choice("timestep_spacing", self.timestep_spacing, ("linspace", "leading", "trailing"))
        if self.trained_betas is None:
            betas = make_betas(
                self.beta_schedule, self.beta_start, self.beta_end, self.num_train_timesteps
            )
        else:
            betas = torch.as_tensor(self.trained_betas, dtype=torch.float32)
        if getattr(self, "rescale_betas_zero_snr", False):  # not all classes have it
            betas = rescale_zero_terminal_snr(betas)
        self.betas = betas
        self.alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
        self._levels: dict[Any, tuple[Tensor, Tensor]] = {}
        super().__post_init__()

    def training_levels(self) -> tuple[Tensor, Tensor]:
        return self.alphas_cumprod**0.5, (1 - self.alphas_cumprod) ** 0.5

    def levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        key = (timesteps.device, self.alphas_cumprod, version_of(self.alphas_cumprod))
        table = self._levels.get(key)
        if table is None:
            alpha, sigma = self.training_levels()
            table = (alpha.to(timesteps.device), sigma.to(timesteps.device))
            self._levels = {key: table}
        index = timesteps if timesteps.dtype == torch.int64 else timesteps.round().long()
        return table[0].index_select(0, index), table[1].index_select(0, index)


@dataclass
class SigmaScheduler(DiffusionScheduler):
    """Schedules of sigmas, of which a Karras, exponential or beta spacing may be asked."""

    _: KW_ONLY
    timestep_spacing: str = "linspace"
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_spacings(self)
        if getattr(self, "rescale_betas_zero_snr", False):
            self.alphas_cumprod[-1] = 2**-24  # sigma must be finite
        self.sigmas = torch.empty(0)

    def spacing(self) -> str | None:
        """karras, exponential or beta, if one of them is asked for."""
        return spacing_of(self)

    def train_sigmas(self) -> np.ndarray:
        return noise_to_signal(self.alphas_cumprod)

    def respaced(self, sigmas: np.ndarray, steps: int) -> np.ndarray | None:
        """The sigmas of the spacing asked for, between the first and the last given."""
        kind = spacing_of(self)
        if kind is None:
            return None
        bounds = (getattr(self, "sigma_min", None), getattr(self, "sigma_max", None))
        return respace(kind, sigmas, steps, *bounds)


def spacing_of(scheduler: Any) -> str | None:
    """The spacing of sigmas that is asked for, karras, exponential or beta, or None."""
    for kind in ("karras", "exponential", "beta"):
        if getattr(scheduler, f"use_{kind}_sigmas"):
            return kind
    return None


def check_spacings(scheduler: Any) -> None:
    """ValueError for more than one spacing of sigmas, ImportError where "beta" lacks scipy."""
    asked = [k for k in ("karras", "exponential", "beta") if getattr(scheduler, f"use_{k}_sigmas")]
    if len(asked) > 1:
        names = ", ".join(f"use_{kind}_sigmas" for kind in asked)
        raise ValueError(f"only one spacing of the sigmas can be used, got {names}")
    if "beta" in asked:
        import scipy.stats  # noqa: F401  (says at once that it is missing)
