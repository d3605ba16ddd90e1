"""Training steps and loops: data sets are tensors, every random number comes from a seed."""

from .batches import batches
from .diffusion import DiffusionStep, DiffusionTrainer
from .ema import EMA
from .gan import GANStep, GANTrainer

__all__ = ["EMA", "DiffusionStep", "DiffusionTrainer", "GANStep", "GANTrainer", "batches"]
