"""Noise schedules and solvers: each solver is a table of rows for ops.scheduler_step.

The classes have the names, arguments and defaults of diffusers' schedulers, and give the same
samples. Their docstrings explain what is particular to a class; the loop is `Scheduler`'s.
"""

from aigc_fast.schedulers.adams import IPNDMScheduler, LMSDiscreteScheduler
from aigc_fast.schedulers.ancestral import DDIMInverseScheduler, DDIMScheduler, DDPMScheduler
from aigc_fast.schedulers.distilled import (
    CMStochasticIterativeScheduler,
    LCMScheduler,
    TCDScheduler,
)
from aigc_fast.schedulers.dpm_singlestep import DPMSolverSinglestepScheduler
from aigc_fast.schedulers.dpm_solver import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
)
from aigc_fast.schedulers.euler import (
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)
from aigc_fast.schedulers.flow_match import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
)
from aigc_fast.schedulers.linear import Row
from aigc_fast.schedulers.pndm import PNDMScheduler
from aigc_fast.schedulers.sa_solver import SASolverScheduler
from aigc_fast.schedulers.scheduler import Scheduler
from aigc_fast.schedulers.two_stage import (
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
)
from aigc_fast.schedulers.unipc import UniPCMultistepScheduler

__all__ = [
    "CMStochasticIterativeScheduler",
    "DDIMInverseScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "HeunDiscreteScheduler",
    "IPNDMScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "Row",
    "SASolverScheduler",
    "Scheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
]
