"""The sizes of a VITS."""

from dataclasses import dataclass, field, fields
from typing import Any

from .checks import check_scale, check_size

#: options that count layers or bins: a hostile file must not make us build them by the thousand
_COUNTS = (
    "num_layers", "flow_couplings", "wavenet_layers", "duration_layers", "duration_bins",
    "duration_flows",
)  # fmt: skip


@dataclass(frozen=True)
class VITSConfig:
    """Sizes of a VITS, and how its voice is meant to be used.

    Attributes:
        vocab_size: phonemes or characters.
        decoder: arguments of `HiFiGANGenerator`, without the channels that come from here.
        stochastic_duration: whether durations are drawn, or are their mean.
        duration_channels: of the predictor without noise; the other one has hidden_channels.
        num_speakers, speaker_channels: 1 and 0 for one voice.
        sample_rate: samples a second.
        noise_scale, length_scale, noise_scale_duration: defaults of `VITS.synthesize`.

    ValueError names a size that will not do.
    """

    vocab_size: int
    decoder: dict[str, Any] = field(hash=False)
    latent_channels: int = 192
    hidden_channels: int = 192
    filter_channels: int = 768
    num_heads: int = 2
    num_layers: int = 6
    kernel_size: int = 3
    window: int = 4
    flow_couplings: int = 4
    wavenet_kernel_size: int = 5
    wavenet_dilation_rate: int = 1
    wavenet_layers: int = 4
    stochastic_duration: bool = True
    duration_channels: int = 256
    duration_kernel_size: int = 3
    duration_layers: int = 3
    duration_bins: int = 10
    duration_flows: int = 4
    num_speakers: int = 1
    speaker_channels: int = 0
    sample_rate: int = 22050
    noise_scale: float = 0.667
    length_scale: float = 1.0
    noise_scale_duration: float = 0.8

    def __post_init__(self) -> None:
        for option in fields(self):
            if option.type is int and option.name != "sample_rate":
                least = 0 if option.name == "speaker_channels" else 1
                check_size(option.name, getattr(self, option.name), least)
        if type(self.sample_rate) is not int or not 1 <= self.sample_rate < 1 << 32:
            raise ValueError(f"sample_rate must be a positive integer, got {self.sample_rate!r}")
        if type(self.stochastic_duration) is not bool:
            found = self.stochastic_duration
            raise ValueError(f"stochastic_duration must be true or false, got {found!r}")
        for name in _COUNTS:
            if (value := getattr(self, name)) > 64:
                raise ValueError(f"{name} must be at most 64, got {value}")
        for name in ("kernel_size", "wavenet_kernel_size", "duration_kernel_size"):
            if getattr(self, name) % 2 == 0:
                raise ValueError(f"{name} must be odd, got {getattr(self, name)}")
        check_size("wavenet_dilation_rate", self.wavenet_dilation_rate ** (self.wavenet_layers - 1))
        check_size("duration_kernel_size", self.duration_kernel_size ** (self.duration_layers - 1))
        if self.hidden_channels % self.num_heads:
            raise ValueError(
                f"num_heads must divide hidden_channels ({self.hidden_channels}), "
                f"got {self.num_heads}"
            )
        if self.latent_channels % 2:
            raise ValueError(f"latent_channels must be even, got {self.latent_channels}")
        if (self.num_speakers > 1) != (self.speaker_channels > 0):
            raise ValueError(
                "speaker_channels must be positive for several speakers and 0 for one, got "
                f"{self.speaker_channels} for {self.num_speakers}"
            )
        for name in ("noise_scale", "length_scale", "noise_scale_duration"):
            check_scale(name, getattr(self, name))
