"""Training a vocoder: checkpoints, a log, a held-out utterance to hear and its spectrograms."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from aigc_fast._devices import default_device
from aigc_fast.io import write_wav
from aigc_fast.io._whole import written_whole
from aigc_fast.models.vocoder import MelConfig, MelSpectrogram, VocoderDiscriminator
from aigc_fast.models.vocoder.checkpoint import fold_weight_norm
from aigc_fast.models.vocoder.configs import CONFIGS, load_vocoder, mel_config, vocoder_class
from aigc_fast.models.vocoder.weight_norm import weight_norm
from aigc_fast.ops._checks import check_choice
from aigc_fast.training import VocoderRecipe, VocoderStep, VocoderTrainer, segments_of

from .pictures import save_mels
from .train import VocoderOptions
from .training_session import TrainingSession
from .vocoder_data import load_speech, split

_BIGVGAN = {"lr": 1e-4, "max_norm": 1000.0}  # where its authors' recipe is another


class Session(TrainingSession):
    """`generator.safetensors` with `config.json` is what `aigc-fast sample vocoder` and
    `from_pretrained` read.

    notes: the distance of mel spectrograms of held-out utterances, "before" and "after".
    """

    options: VocoderOptions
    losses = ("g_loss", "d_loss", "mel")
    loss_label = "losses"
    loss_scale = "log"  # of unlike sizes
    unit = "segments"
    log_every = 10

    def __init__(self, options: VocoderOptions) -> None:
        self.options = options
        device = default_device()
        torch.manual_seed(options.seed)
        if options.model is None:
            arch = "hifigan-v1" if options.arch is None else options.arch
            check_choice("arch", arch, CONFIGS)
            generator, config = None, dict(CONFIGS[arch])
        elif options.arch is not None:
            raise ValueError(f"arch must be left out with a model to go on from: {options.arch}")
        else:
            generator, config = load_vocoder(options.model)
        recipe = _recipe(options, config)
        waveforms, rate = load_speech(options.data, device)
        if generator is None:
            config |= asdict(MelConfig(rate, fmax=min(8000.0, rate / 2)))
            generator = vocoder_class(config).from_config(config)
        elif (wanted := mel_config(config).sampling_rate) != rate:
            raise ValueError(f"data must have the model's {wanted} samples a second, has {rate}")
        kind = "bigvgan" if "activation" in config else "hifigan"
        discriminator = VocoderDiscriminator(options.discriminator_channels, kind)
        if options.discriminators is not None:
            discriminator.load_published(options.discriminators)
        self.mel = MelSpectrogram(mel_config(config))
        waveforms, aside = split(waveforms, rate)
        self._check_length(min(map(len, aside)))
        self.held_out = [w[None].to(device) / 32768 for w in aside]
        self.samples = segments_of(waveforms, recipe.segment).to(device)
        self.labels = None
        self.networks = {"config": config, "discriminator": options.discriminator_channels}
        self.trainer = VocoderTrainer(
            weight_norm(generator).to(device), discriminator.to(device), self.mel, recipe,
            seed=options.seed,
        )  # fmt: skip
        self.open()

    def _check_length(self, shortest: int) -> None:
        """Of held-out utterances, whose whole frames are made anew and compared."""
        hop = self.mel.config.hop_size
        if shortest < (least := -(-self.mel.config.least // hop) * hop):
            raise ValueError(
                f"data must have at least {least} samples in every tenth file, which is held out, "
                f"got {shortest}"
            )

    def losses_of(self, state: VocoderStep) -> tuple[Tensor, ...]:
        return state.g_loss, state.d_loss, state.mel

    def _train(self, console: Console) -> None:
        if not self.trainer.steps_done:
            self.notes["before"] = self._listen()[0]
        console.print(
            f"{len(self.samples)} segments of {self.trainer.recipe.segment} samples; distance of "
            f"mel spectrograms of {len(self.held_out)} held-out utterances: "
            f"{self.notes['before']:.4g}"
        )
        super()._train(console)
        console.print(f"distance of held-out spectrograms: {self.notes['after']:.4g}")

    @torch.inference_mode()
    def _listen(self) -> tuple[float, Tensor]:
        """The mean distance of spectrograms, up to half the sampling rate, of the held-out
        utterances and what the generator makes of them, and that of the first."""
        model = vocoder_class(self.networks["config"]).from_config(self.networks["config"])
        model.load_state_dict(self._weights())
        model.to(self.samples.device).eval()
        distances, made = [], []
        for waveform in self.held_out:
            made.append(model(self.mel(waveform)))
            whole = waveform[:, : made[-1].shape[2]]  # the last frame may be no whole one
            distances.append(F.l1_loss(*map(self.trainer.compared, (made[-1], whole))))
        return torch.stack(distances).mean().item(), made[0][0, 0].cpu()

    def _weights(self) -> dict[str, Tensor]:
        """Of the generator to listen to, as one without weight norm has them."""
        return fold_weight_norm(self.trainer.average.state_dict())

    def keep_samples(self) -> None:
        from safetensors.torch import save_file

        self.notes["after"], waveform = self._listen()
        output, config, mel = self.options.output, self.networks["config"], self.mel.config
        _write(output / "config.json", config)
        with written_whole(output / "generator.safetensors") as partial:
            save_file({name: w.contiguous() for name, w in self._weights().items()}, partial)
        real = self.held_out[0]
        write_wav(output / "real.wav", [real.cpu()], mel.sampling_rate)
        write_wav(output / "sample.wav", [waveform], mel.sampling_rate)
        both = {"real": real.cpu(), "generated": waveform[None]}
        compared = self.trainer.compared
        pictures = {k: compared(w.to(real.device))[0].cpu() for k, w in both.items()}
        save_mels(output / "samples.png", pictures, mel.hop_size / mel.sampling_rate)


def _recipe(options: VocoderOptions, config: dict[str, Any]) -> VocoderRecipe:
    """That of the architecture's authors, with what else is asked for."""
    changes: dict[str, Any] = dict(_BIGVGAN) if "activation" in config else {}
    if options.lr is not None:
        changes["lr"] = options.lr
    return VocoderRecipe(
        segment=options.segment, ema_decay=options.ema, bf16=options.bf16, **changes
    )


def _write(path: Path, config: dict[str, Any]) -> None:
    with written_whole(path) as partial:
        partial.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
