"""Training steps and loops: data sets are tensors, every random number comes from a seed."""

from .batches import batches, epochs_of_batches
from .checkpoint import load_checkpoint, save_checkpoint
from .denoising import Denoising
from .diffusion import DiffusionRecipe, DiffusionStep, DiffusionTrainer
from .ema import EMA
from .gan import GANStep, GANTrainer
from .gan_recipe import RECIPES, GANRecipe
from .language import LanguageRecipe, LanguageStep, LanguageTrainer, perplexity, windows_of
from .log import CSVLog, TensorBoardLog
from .optim import Adam, AdamW
from .penalties import gradient_penalty, path_length_penalty, r1_penalty, r2_penalty
from .vae import VAERecipe, VAEStep, VAETrainer, log_likelihood
from .vocoder import VocoderRecipe, VocoderStep, VocoderTrainer, segments_of

__all__ = [
    "EMA",
    "RECIPES",
    "Adam",
    "AdamW",
    "CSVLog",
    "Denoising",
    "DiffusionRecipe",
    "DiffusionStep",
    "DiffusionTrainer",
    "GANRecipe",
    "GANStep",
    "GANTrainer",
    "LanguageRecipe",
    "LanguageStep",
    "LanguageTrainer",
    "TensorBoardLog",
    "VAERecipe",
    "VAEStep",
    "VAETrainer",
    "VocoderRecipe",
    "VocoderStep",
    "VocoderTrainer",
    "batches",
    "epochs_of_batches",
    "gradient_penalty",
    "load_checkpoint",
    "log_likelihood",
    "path_length_penalty",
    "perplexity",
    "r1_penalty",
    "r2_penalty",
    "save_checkpoint",
    "segments_of",
    "windows_of",
]
