"""Noise schedules and solvers: each solver is a table of rows for ops.scheduler_step."""

from aigc_fast.schedulers.ddim import DDIMScheduler
from aigc_fast.schedulers.ddpm import DDPMScheduler
from aigc_fast.schedulers.dpm_solver_multistep import DPMSolverMultistepScheduler
from aigc_fast.schedulers.scheduler import Scheduler, StepCoefficients

__all__ = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "Scheduler",
    "StepCoefficients",
]
