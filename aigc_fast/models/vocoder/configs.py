"""Published vocoders by name, and a vocoder of whichever kind from what its config.json says."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from aigc_fast.io.hf_folder import read_json

from .bigvgan import BigVGANGenerator
from .generator import Generator
from .hifigan import HiFiGANGenerator
from .mel import MelConfig

_BLOCKS = {
    "resblock": "1",
    "resblock_kernel_sizes": [3, 7, 11],
    "resblock_dilation_sizes": [[1, 3, 5]] * 3,
}
_BY_FOUR = {"upsample_rates": [8, 8, 2, 2], "upsample_kernel_sizes": [16, 16, 4, 4], **_BLOCKS}
_SNAKES = {"activation": "snakebeta", "snake_logscale": True}

#: What config.json says of the generator, for 80 bands and a hop of 256. Sources: Kong et al. 2020
#: (arXiv:2010.05646); Lee et al. 2023 (arXiv:2206.04658), of 22 kHz.
CONFIGS: dict[str, dict[str, Any]] = {
    "hifigan-v1": {**_BY_FOUR, "upsample_initial_channel": 512},
    "hifigan-v2": {**_BY_FOUR, "upsample_initial_channel": 128},
    "hifigan-v3": {
        "resblock": "2",
        "upsample_rates": [8, 8, 4],
        "upsample_kernel_sizes": [16, 16, 8],
        "upsample_initial_channel": 256,
        "resblock_kernel_sizes": [3, 5, 7],
        "resblock_dilation_sizes": [[1, 2], [2, 6], [3, 12]],
    },
    "bigvgan-base": {**_BY_FOUR, **_SNAKES, "upsample_initial_channel": 512},
    "bigvgan": {
        **_BLOCKS,
        **_SNAKES,
        "upsample_rates": [4, 4, 2, 2, 2, 2],
        "upsample_kernel_sizes": [8, 8, 4, 4, 4, 4],
        "upsample_initial_channel": 1536,
    },
}


def vocoder_class(config: Mapping[str, Any]) -> type[Generator]:
    """BigVGAN's has a name for its activation."""
    return BigVGANGenerator if "activation" in config else HiFiGANGenerator


def mel_config(config: Mapping[str, Any]) -> MelConfig:
    """The spectrogram that a config.json describes; ValueError for numbers that will not do."""
    names = [option.name for option in fields(MelConfig)]
    return MelConfig(**{name: config[name] for name in names if name in config})


def load_vocoder(
    path: str | os.PathLike[str], config: str | os.PathLike[str] | None = None
) -> tuple[Generator, dict[str, Any]]:
    """The generator of a checkpoint of HiFi-GAN or BigVGAN, and its config.

    path, config, errors: as for `Generator.from_pretrained`; ValueError also where the hop of the
    spectrogram is not the generator's.
    """
    config_path = Path(path).parent / "config.json" if config is None else Path(config)
    found = read_json(config_path)
    model = vocoder_class(found).from_pretrained(path, config_path)
    try:
        hop = mel_config(found).hop_size
    except ValueError as error:
        raise ValueError(f"{config_path}: {error}") from None
    if hop != model.hop:
        raise ValueError(f"{config_path}: hop_size must be that of the model, {model.hop}: {hop}")
    return model, found
