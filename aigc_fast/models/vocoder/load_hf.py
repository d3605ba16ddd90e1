"""VITS from the folders of transformers' VitsModel."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from aigc_fast.io.hf_folder import read_hf_folder
from aigc_fast.models.state import assign_state, fetch_from

from .checkpoint import fold_weight_norm
from .vits import VITS
from .vits_config import VITSConfig

#: transformers' option -> ours
_OPTIONS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_channels",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "window_size": "window",
    "ffn_dim": "filter_channels",
    "ffn_kernel_size": "kernel_size",
    "flow_size": "latent_channels",
    "use_stochastic_duration_prediction": "stochastic_duration",
    "num_speakers": "num_speakers",
    "speaker_embedding_size": "speaker_channels",
    "depth_separable_num_layers": "duration_layers",
    "duration_predictor_flow_bins": "duration_bins",
    "duration_predictor_kernel_size": "duration_kernel_size",
    "duration_predictor_num_flows": "duration_flows",
    "duration_predictor_filter_channels": "duration_channels",
    "prior_encoder_num_flows": "flow_couplings",
    "prior_encoder_num_wavenet_layers": "wavenet_layers",
    "wavenet_kernel_size": "wavenet_kernel_size",
    "wavenet_dilation_rate": "wavenet_dilation_rate",
    "sampling_rate": "sample_rate",
    "noise_scale": "noise_scale",
    "noise_scale_duration": "noise_scale_duration",
}
_DECODER = (
    "upsample_rates", "upsample_kernel_sizes", "upsample_initial_channel",
    "resblock_kernel_sizes", "resblock_dilation_sizes",
)  # fmt: skip
#: options with the only value that is supported, which is also transformers' default
_FIXED = {
    "hidden_act": "relu",
    "use_bias": True,
    "leaky_relu_slope": 0.1,
    "layer_norm_eps": 1e-5,
    "depth_separable_channels": 2,
    "duration_predictor_tail_bound": 5.0,
}
#: transformers' defaults where ours are others
_DEFAULTS = {"vocab_size": 38, "sample_rate": 16000}
_DECODER_DEFAULTS = {
    "upsample_rates": (8, 8, 2, 2),
    "upsample_kernel_sizes": (16, 16, 4, 4),
    "upsample_initial_channel": 512,
}

#: Parts of transformers' names and what the original calls them, replaced one after the other.
_NAMES = [
    (r"^text_encoder\.embed_tokens\.", "enc_p.emb."),
    (r"^text_encoder\.project\.", "enc_p.proj."),
    (r"^text_encoder\.encoder\.", "enc_p.encoder."),
    (r"\.layers\.(\d+)\.attention\.", r".attn_layers.\1."),
    (r"\.layers\.(\d+)\.feed_forward\.", r".ffn_layers.\1."),
    (r"\.layers\.(\d+)\.layer_norm\.", r".norm_layers_1.\1."),
    (r"\.layers\.(\d+)\.final_layer_norm\.", r".norm_layers_2.\1."),
    (r"\.([qkv])_proj\.", r".conv_\1."),
    (r"\.out_proj\.", ".conv_o."),
    (r"^duration_predictor\.", "dp."),
    (r"^decoder\.upsampler\.", "dec.ups."),
    (r"^decoder\.", "dec."),
    (r"^embed_speaker\.", "emb_g."),
    (r"^((?:dp|flow)\..*|dp\.)conv_pre\.", r"\1pre."),
    (r"^(dp\..*|dp\.)conv_proj\.", r"\1proj."),
    (r"^(flow\..*)conv_post\.", r"\1post."),
    (r"\.conv_dds\.", ".convs."),
    (r"\.convs_dilated\.", ".convs_sep."),
    (r"\.convs_pointwise\.", ".convs_1x1."),
    (r"\.wavenet\.", ".enc."),
    (r"\.translate$", ".m"),
    (r"\.log_scale$", ".logs"),
    (r"(\.norm\w*(?:\.\d+)?)\.weight$", r"\1.gamma"),
    (r"(\.norm\w*(?:\.\d+)?)\.bias$", r"\1.beta"),
]  # fmt: skip
#: what only training needs, and the coupling whose result nothing hears
_UNUSED = re.compile(r"posterior_encoder\.|duration_predictor\.(post_|flows\.1\.)")


def load_hf(path: str | os.PathLike[str]) -> VITS:
    """See `VITS.from_pretrained`."""
    folder = read_hf_folder(path)
    try:
        config = _config(folder.config)
        with torch.device("meta"):
            model = VITS(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder.path}: config: {error}") from None
    used = {name: folder.get_tensor(name) for name in folder.tensors if not _UNUSED.match(name)}
    try:
        state = _rename(fold_weight_norm(used))
    except ValueError as error:
        raise ValueError(f"{folder.path}: {error}") from None
    return assign_state(model, set(state), fetch_from(state, folder.path), folder.path)


def _config(options: Mapping[str, Any]) -> VITSConfig:
    for name, value in _FIXED.items():
        if options.get(name, value) != value:
            raise ValueError(f"{name} must be {value!r}, got {options[name]!r}")
    found = _DEFAULTS | {ours: options[name] for name, ours in _OPTIONS.items() if name in options}
    rate = options.get("speaking_rate", 1.0)
    if type(rate) not in (int, float) or not rate > 0:
        raise ValueError(f"speaking_rate must be positive, got {rate!r}")
    decoder = _DECODER_DEFAULTS | {name: options[name] for name in _DECODER if name in options}
    return VITSConfig(decoder=decoder, length_scale=1 / rate, **found)


def _rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state.items():
        ours = name
        for pattern, replacement in _NAMES:
            ours = re.sub(pattern, replacement, ours)
        if match := re.fullmatch(r"(dp|flow)\.flows\.(\d+)\.(.+)", ours):
            # The original counts what turns channels around between two layers too.
            number = int(match[2])
            number = 2 * number if match[1] == "flow" else max(2 * number - 1, 0)
            ours = f"{match[1]}.flows.{number}.{match[3]}"
        if re.search(r"\.conv_[qkvo]\.weight$", ours) and tensor.dim() == 2:
            tensor = tensor[:, :, None]  # a Linear there, a convolution of one step here
        renamed[ours] = tensor
    return renamed
