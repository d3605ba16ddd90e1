"""What takes the place of the vocoders and the audio codec of transformers.

The operators of convolutions are for CPUs. Elsewhere, and where something hangs on a layer whose
work is done here (a hook, weight norm, an adapter), the stock code runs.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from aigc_fast import ops
from aigc_fast.integrations._patching import Assignment, Replacement, Unfit
from aigc_fast.nn._conv1d import convolve, is_compiled, is_fused, upsample
from aigc_fast.nn._replacing import runs_as_written
from aigc_fast.nn._upsampling import in_parts, mean, residual_pairs

#: channels of DAC's sequences from which torch's convolutions are the faster ones
WIDE = 512


def takes(convs: Iterable[Any], x: Tensor) -> bool:
    """Whether our operators do what these layers would do to x, and to what follows from it."""
    # A trace would keep the number of parts of a sequence.
    if x.dim() != 3 or torch.jit.is_tracing():
        return False
    return all(
        _is_plain(conv) and conv.weight.dtype == x.dtype and is_compiled(conv) for conv in convs
    )


def _is_plain(conv: Any) -> bool:
    """Whether it is torch's own layer, its weight a parameter, with what our operators know."""
    if type(conv) is nn.ConvTranspose1d:
        known = conv.dilation == (1,) and conv.output_padding == (0,)
    else:
        known = type(conv) is nn.Conv1d and not isinstance(conv.padding, str)
    return known and conv.padding_mode == "zeros" and runs_as_written(conv)


class HifiGanBlock(Replacement):
    uses = "conv1d"
    absorbs = ("convs1", "convs2")
    minds_hooks = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not takes(convs_of(self), hidden_states):
            return super().forward(hidden_states)
        return run_block(self, hidden_states)


def convs_of(block: HifiGanBlock) -> list[nn.Conv1d]:
    return [*block.convs1, *block.convs2]


def run_block(
    block: HifiGanBlock, x: Tensor, residuals: Sequence[Tensor] = (), gain: float = 1.0
) -> Tensor:
    """gain * (block(x) + sum(residuals))."""

    def after_relu(
        x: Tensor, conv: nn.Conv1d, _number: int, residuals: Sequence[Tensor] = (), gain: float = 1
    ) -> Tensor:
        return convolve(x, conv, block.leaky_relu_slope, residuals, gain)

    return residual_pairs(after_relu, x, block.convs1, block.convs2, residuals, gain)


class HifiGan(Replacement):
    """What the generators have in common."""

    uses = "conv1d, conv_transpose1d"
    absorbs = ("conv_pre", "upsampler", "conv_post")
    minds_hooks = True


def takes_all(generator: HifiGan, x: Tensor) -> bool:
    blocks = list(generator.resblocks)
    if not all(isinstance(block, HifiGanBlock) and runs_as_written(block) for block in blocks):
        return False
    own = [generator.conv_pre, *generator.upsampler, generator.conv_post]
    return takes([*own, *(conv for block in blocks for conv in convs_of(block))], x)


def waveform(generator: HifiGan, x: Tensor) -> Tensor:
    """(batch, 1, samples) of what conv_pre gives."""
    each, last = generator.num_kernels, generator.num_upsamples - 1

    def stage(x: Tensor, i: int) -> Tensor:
        x = upsample(x, generator.upsampler[i], generator.config.leaky_relu_slope)
        x = mean([partial(run_block, block) for block in blocks_of(i)], x)
        if i < last:
            return x
        return torch.tanh(convolve(x, generator.conv_post, 0.01))  # leaky_relu's default

    def blocks_of(i: int) -> list[HifiGanBlock]:
        return list(generator.resblocks[i * each : (i + 1) * each])

    for i, up in enumerate(generator.upsampler):
        if not is_fused(generator.conv_post, x):  # whose parts would be kept beside the whole
            x = stage(x, i)
            continue
        reaches = [sum(int(conv.padding[0]) for conv in convs_of(block)) for block in blocks_of(i)]
        reach = max(reaches) + generator.conv_post.padding[0]
        x = in_parts(partial(stage, i=i), x, up, reach)
    return x


class SpectrogramHifiGan(HifiGan):
    """SpeechT5's and FastSpeech2Conformer's: frames of mel bands, with a batch or without."""

    def forward(self, spectrogram: Tensor, **kwargs: Any) -> Tensor:
        x = spectrogram if spectrogram.dim() == 3 else spectrogram[None]
        if not takes_all(self, x):
            return super().forward(spectrogram, **kwargs)
        if self.config.normalize_before:
            x = (x - self.mean) / self.scale
        y = waveform(self, convolve(x.transpose(1, 2), self.conv_pre)).squeeze(1)
        return y if spectrogram.dim() == 3 else y.squeeze(0)


class LatentHifiGan(HifiGan):
    """VITS's: latents, and a speaker's vector."""

    def forward(self, spectrogram: Tensor, global_conditioning: Tensor | None = None) -> Tensor:
        if not takes_all(self, spectrogram):
            return super().forward(spectrogram, global_conditioning)
        x = convolve(spectrogram, self.conv_pre)
        if global_conditioning is not None:
            x = x + self.cond(global_conditioning)
        return waveform(self, x)


class Snake(Replacement):
    uses = "snake"
    alpha: Tensor

    def forward(self, hidden_states: Tensor) -> Tensor:
        # Autocast brings hidden states of another dtype.
        if hidden_states.dtype != self.alpha.dtype:
            return super().forward(hidden_states)
        return ops.snake(hidden_states, self.alpha.flatten())


class Dac(Replacement):
    """A part of DAC whose convolutions are fused where they are narrow."""

    minds_hooks = True

    @classmethod
    def assignments(cls, module: Any) -> Iterable[Assignment]:
        for conv in (getattr(module, name) for name in cls.absorbs):
            if not isinstance(conv, (nn.Conv1d, nn.ConvTranspose1d)):
                raise Unfit(f"its convolution is {type(conv).__name__}")
            if conv.in_channels >= WIDE:
                raise Unfit(f"torch's convolutions of {conv.in_channels} channels are faster")
        yield from super().assignments(module)


class DacUnit(Dac):
    uses = "conv1d"
    absorbs = ("conv1", "conv2")

    def forward(self, hidden_state: Tensor) -> Tensor:
        if not takes([self.conv1, self.conv2], hidden_state):
            return super().forward(hidden_state)
        y = self.snake2(convolve(self.snake1(hidden_state), self.conv1))
        return convolve(y, self.conv2, residuals=[hidden_state])


class DacEncoderBlock(Dac):
    uses = "conv1d"
    absorbs = ("conv1",)

    def forward(self, hidden_state: Tensor) -> Tensor:
        if not takes([self.conv1], hidden_state):
            return super().forward(hidden_state)
        x = self.res_unit3(self.res_unit2(self.res_unit1(hidden_state)))
        return convolve(self.snake1(x), self.conv1)


class DacDecoderBlock(Dac):
    uses = "conv_transpose1d"
    absorbs = ("conv_t1",)

    def forward(self, hidden_state: Tensor) -> Tensor:
        if not takes([self.conv_t1], hidden_state):
            return super().forward(hidden_state)
        x = upsample(self.snake1(hidden_state), self.conv_t1)
        return self.res_unit3(self.res_unit2(self.res_unit1(x)))


HIFIGAN = {"HifiGanResidualBlock": HifiGanBlock}
#: model_type: class -> what takes its place
ARCHITECTURES: dict[str, dict[str, type[Replacement]]] = {
    "speecht5": HIFIGAN | {"SpeechT5HifiGan": SpectrogramHifiGan},
    "fastspeech2_conformer": HIFIGAN | {"FastSpeech2ConformerHifiGan": SpectrogramHifiGan},
    "vits": HIFIGAN | {"VitsHifiGan": LatentHifiGan},
    "dac": {
        "Snake1d": Snake,
        "DacResidualUnit": DacUnit,
        "DacEncoderBlock": DacEncoderBlock,
        "DacDecoderBlock": DacDecoderBlock,
    },
}
