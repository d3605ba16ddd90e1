"""Training steps and loops: data sets are tensors, every random number comes from a seed."""

from .batches import batches
from .ema import EMA
from .gan import GANStep, GANTrainer

__all__ = ["EMA", "GANStep", "GANTrainer", "batches"]
