"""StyleGAN2 weights under the names of the two well-known PyTorch implementations."""

import re
from collections.abc import Mapping

from torch import Tensor

from aigc_fast.models.gan.stylegan2 import StyleGAN2Generator
from aigc_fast.models.gan.stylegan2_discriminator import StyleGAN2Discriminator


def load_stylegan2(
    model: StyleGAN2Generator | StyleGAN2Discriminator, weights: Mapping[str, Tensor]
) -> None:
    """Loads a state dict with rosinality's or NVlabs' names, in place.

    rosinality/stylegan2-pytorch: the members "g_ema" (or "g") and "d" of a checkpoint. These are
    the model's own names, with a leading dimension of 1 in the weight of modulated convolutions:
    style.N.weight, input.input, conv1.conv.weight, conv1.activate.bias,
    convs.N.conv.modulation.weight, to_rgbs.N.bias, noises.noise_N; convs.0.0.weight,
    convs.N.conv2.1.weight, final_linear.1.bias.

    NVlabs/stylegan2-ada-pytorch, with R the resolution of a block and k = log2(R) - 3:

        mapping.fcN, mapping.embed, mapping.w_avg    style.(N + 1), embed, latent_avg
        synthesis.b4.const                           input.input
        synthesis.b4.conv1, .torgb                   conv1, to_rgb1
        synthesis.bR.conv0, .conv1, .torgb           convs.(2 k), convs.(2 k + 1), to_rgbs.k
        in them: weight, affine, bias                conv.weight, conv.modulation, activate.bias
                                                     (of torgb: bias)
                 noise_strength, noise_const         noise.weight, noises.noise_N
        bR.fromrgb, .conv0, .conv1, .skip            convs.0, convs.N.conv1, .conv2, .skip with
                                                     N = log2(resolution / R) + 1
        b4.conv, b4.fc, b4.out                       final_conv, final_linear.0, final_linear.1

    Buffers (FIR filters, constant noise, the average style) that are not there keep their values.

    Raises ValueError for a name or shape that the model does not have, and for a parameter that is
    missing. NVlabs' conditional discriminator, with a mapping network of its own, is another model.
    """
    if any(re.match(r"(synthesis|mapping|b\d+)\.", name) for name in weights):
        weights = _from_nvlabs(weights)
    weights = {name: w[0] if w.dim() == 5 else w for name, w in weights.items()}
    own = model.state_dict()
    if unknown := sorted(set(weights) - set(own)):
        raise ValueError(f"weights must be those of the model, got also {_some(unknown)}")
    if missing := sorted({name for name, _ in model.named_parameters()} - set(weights)):
        raise ValueError(f"weights must have every parameter, missing are {_some(missing)}")
    for name, value in weights.items():
        if value.shape != own[name].shape:
            shapes = f"{tuple(own[name].shape)}, got {tuple(value.shape)}"
            raise ValueError(f"weights[{name!r}] must have shape {shapes}")
    model.load_state_dict(weights, strict=False)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _from_nvlabs(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    sizes = [int(m[1]) for name in weights if (m := re.match(r"b(\d+)\.", name))]
    resolution = max(sizes, default=0)
    found = {}
    for name, value in weights.items():
        if name.endswith("resample_filter"):
            continue  # the model has its own, with the gain of upsampling in it
        renamed = _rename(name, resolution)
        if renamed == "input.input":
            value = value.unsqueeze(0)
        elif ".noise_" in renamed:
            value = value.reshape(1, 1, *value.shape)
        elif renamed.endswith("noise.weight"):
            value = value.reshape(1)
        elif renamed.startswith("to_rgb") and renamed.endswith("bias") and "modul" not in renamed:
            value = value.reshape(1, -1, 1, 1)
        found[renamed] = value
    return found


def _rename(name: str, resolution: int) -> str:
    if name == "mapping.w_avg":
        return "latent_avg"
    if name == "synthesis.b4.const":
        return "input.input"
    if m := re.fullmatch(r"mapping\.fc(\d+)\.(\w+)", name):
        return f"style.{int(m[1]) + 1}.{m[2]}"
    if m := re.fullmatch(r"mapping\.embed\.(\w+)", name):
        return f"embed.{m[1]}"
    if m := re.fullmatch(r"synthesis\.b(\d+)\.(conv0|conv1|torgb)\.(.+)", name):
        return _of_synthesis(int(m[1]), m[2], m[3])
    if m := re.fullmatch(r"b4\.(conv|fc|out)\.(weight|bias)", name):
        if m[1] == "conv":
            return "final_conv." + ("0.weight" if m[2] == "weight" else "1.bias")
        return f"final_linear.{int(m[1] == 'out')}.{m[2]}"
    if m := re.fullmatch(r"b(\d+)\.(fromrgb|conv0|conv1|skip)\.(weight|bias)", name):
        block, layer, bias = int(m[1]), m[2], m[3] == "bias"
        number = resolution.bit_length() - block.bit_length() + 1
        first = layer in ("conv1", "skip")  # they begin with a blur
        place = {
            "fromrgb": "convs.0",
            "conv0": f"convs.{number}.conv1",
            "conv1": f"convs.{number}.conv2",
            "skip": f"convs.{number}.skip",
        }[layer]
        return f"{place}.{int(first) + int(bias)}.{m[3]}"
    return name


def _of_synthesis(resolution: int, layer: str, rest: str) -> str:
    k = resolution.bit_length() - 4
    if layer == "torgb":
        place = "to_rgb1" if k < 0 else f"to_rgbs.{k}"
        return f"{place}.{rest}" if rest == "bias" else f"{place}.{_of_conv(rest)}"
    number = 2 * k + int(layer == "conv1")
    if rest == "noise_const":
        return f"noises.noise_{number + 1}"
    return f"conv1.{_of_conv(rest)}" if k < 0 else f"convs.{number}.{_of_conv(rest)}"


def _of_conv(rest: str) -> str:
    names = {"weight": "conv.weight", "bias": "activate.bias", "noise_strength": "noise.weight"}
    return names.get(rest, rest.replace("affine.", "conv.modulation."))
