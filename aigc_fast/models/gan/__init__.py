"""Generative adversarial networks."""

from .load_ncnn import load_generator
from .mlp import MLPDiscriminator, MLPGenerator
from .rrdb import RRDBNet
from .srvgg import SRVGGNetCompact
from .upscale import upscale

__all__ = [
    "MLPDiscriminator",
    "MLPGenerator",
    "RRDBNet",
    "SRVGGNetCompact",
    "load_generator",
    "upscale",
]
