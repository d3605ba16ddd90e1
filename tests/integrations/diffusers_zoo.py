"""Small random models of diffusers, a call of each, and the same in float64 throughout."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.models.checkpoints import Exact

UNET = dict(
    sample_size=8,
    block_out_channels=(16, 32),
    layers_per_block=1,
    norm_num_groups=8,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)
TRANSFORMER = dict(attention_head_dim=8, num_attention_heads=2, in_channels=4, num_layers=2)
WAN = TRANSFORMER | dict(
    attention_head_dim=12,
    out_channels=4,
    text_dim=12,
    freq_dim=16,
    ffn_dim=32,
    rope_max_seq_len=16,
)


class Case(NamedTuple):
    """A class of diffusers, its arguments, the keyword arguments of a call, and the operators that
    the patched model runs."""

    cls: str
    options: dict[str, Any]
    inputs: Callable[[], dict[str, Any]]
    operators: set[str]


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def image(channels: int = 3) -> Tensor:
    return rand(2, channels, 8, 8)


TIMES = torch.tensor([3.0, 977.0])
IN_UNETS = {"group_norm_act", "timestep_embedding"}
ADALN = {
    "modulated_norm",
    "gated_residual",
    "gated_residual_norm",
    "timestep_embedding",
    "gelu_tanh",
}
CASES = {
    "unet": Case("UNet2DModel", UNET, lambda: dict(sample=image(), timestep=TIMES), IN_UNETS),
    "unet, modulated": Case(
        "UNet2DModel",
        UNET | dict(resnet_time_scale_shift="scale_shift", num_class_embeds=5),
        lambda: dict(sample=image(), timestep=TIMES, class_labels=torch.tensor([4, 0])),
        IN_UNETS,
    ),
    "unet with text": Case(
        "UNet2DConditionModel",
        UNET
        | dict(
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=12,
            attention_head_dim=4,
        ),
        lambda: dict(sample=image(4), timestep=TIMES, encoder_hidden_states=rand(2, 5, 12)),
        IN_UNETS | {"geglu"},
    ),
    "autoencoder": Case(
        "AutoencoderKL",
        dict(
            block_out_channels=(16, 32),
            norm_num_groups=8,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        lambda: dict(sample=image()),
        {"group_norm_act"},
    ),
    "video autoencoder": Case(
        "AutoencoderKLWan",
        dict(base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True]),
        lambda: dict(sample=rand(1, 3, 5, 8, 8)),
        set(),
    ),
    "dit": Case(
        "DiTTransformer2DModel",
        TRANSFORMER | dict(sample_size=8, num_embeds_ada_norm=10),
        lambda: dict(hidden_states=image(4), timestep=TIMES, class_labels=torch.tensor([9, 0])),
        ADALN,
    ),
    "sd3": Case(
        "SD3Transformer2DModel",
        TRANSFORMER
        | dict(
            sample_size=8,
            joint_attention_dim=12,
            caption_projection_dim=16,
            pooled_projection_dim=12,
            out_channels=4,
            pos_embed_max_size=8,
            qk_norm="rms_norm",
            dual_attention_layers=(0,),
        ),
        lambda: dict(
            hidden_states=image(4),
            encoder_hidden_states=rand(2, 5, 12),
            pooled_projections=rand(2, 12),
            timestep=TIMES,
        ),
        ADALN | {"rms_norm"},
    ),
    "flux": Case(
        "FluxTransformer2DModel",
        TRANSFORMER
        | dict(
            num_layers=1,
            num_single_layers=1,
            joint_attention_dim=12,
            pooled_projection_dim=12,
            axes_dims_rope=(2, 2, 4),
            guidance_embeds=True,
        ),
        lambda: dict(
            hidden_states=rand(2, 16, 4),
            encoder_hidden_states=rand(2, 5, 12),
            pooled_projections=rand(2, 12),
            timestep=torch.tensor([0.25, 0.5]),  # times 1000 in the dtype of the model
            guidance=torch.tensor([0.5, 0.25]),
            img_ids=torch.cartesian_prod(*map(torch.arange, (1, 4, 4))).float(),
            txt_ids=torch.zeros(5, 3),
        ),
        ADALN | {"qk_norm_rotary"},
    ),
    "wan": Case(
        "WanTransformer3DModel",
        WAN,
        lambda: dict(
            hidden_states=rand(2, 4, 3, 8, 8),
            encoder_hidden_states=rand(2, 5, 12),
            timestep=TIMES,
        ),
        (ADALN - {"gated_residual_norm"}) | {"rms_norm", "apply_rotary"},
    ),
    "wan with an image": Case(
        "WanTransformer3DModel",
        WAN | dict(num_layers=1, image_dim=12, added_kv_proj_dim=24),
        lambda: dict(
            hidden_states=rand(2, 4, 3, 8, 8),
            encoder_hidden_states=rand(2, 512, 12),
            encoder_hidden_states_image=rand(2, 7, 12),
            timestep=TIMES,
        ),
        (ADALN - {"gated_residual_norm"}) | {"rms_norm", "apply_rotary"},
    ),
    # Whose own blocks stay.
    "qwen-image": Case(
        "QwenImageTransformer2DModel",
        TRANSFORMER
        | dict(out_channels=1, joint_attention_dim=12, num_layers=1, axes_dims_rope=(2, 2, 4)),
        lambda: dict(
            hidden_states=rand(2, 16, 4),
            encoder_hidden_states=rand(2, 5, 12),
            timestep=torch.tensor([0.25, 0.5]),
            img_shapes=[(1, 4, 4)] * 2,
        ),
        {"modulated_norm", "rms_norm", "timestep_embedding", "gelu_tanh"},
    ),
    "flux2": Case(
        "Flux2Transformer2DModel",
        TRANSFORMER
        | dict(
            num_layers=1,
            num_single_layers=1,
            joint_attention_dim=12,
            timestep_guidance_channels=16,
            axes_dims_rope=(2, 2, 2, 2),
        ),
        lambda: dict(
            hidden_states=rand(2, 16, 4),
            encoder_hidden_states=rand(2, 5, 12),
            timestep=torch.tensor([0.25, 0.5]),
            guidance=torch.tensor([0.5, 0.25]),
            img_ids=torch.cartesian_prod(*map(torch.arange, (1, 4, 4, 1))).float(),
            txt_ids=torch.cartesian_prod(*map(torch.arange, (1, 1, 1, 5))).float(),
        ),
        {"modulated_norm", "rms_norm", "timestep_embedding"},
    ),
}


def make(name: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    import diffusers

    torch.manual_seed(0)
    case = CASES[name]
    model = getattr(diffusers, case.cls)(**case.options).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:  # else all norms would be alike
                weight.add_(torch.randn(weight.shape) * 0.2)
    return model.to(dtype)


def _cast(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def inputs_of(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Of a call, as pipelines pass them."""
    keep = {"timestep", "guidance", "img_ids", "txt_ids"}
    return {key: x if key in keep else _cast(x, dtype) for key, x in CASES[name].inputs().items()}


def outputs(model: torch.nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [model(**inputs).sample]


def gradients(model: torch.nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The output and the gradient of every parameter that wants one, for an upstream gradient of
    random numbers that every dtype holds."""
    out = model(**inputs).sample
    upstream = rand(*out.shape).to(torch.bfloat16).to(out.dtype)
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(out, parameters, upstream, allow_unused=True)
    return [
        out.detach(),
        *(torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)),
    ]


def exact(
    run: Callable[..., list[Tensor]], model: torch.nn.Module, inputs: dict[str, Tensor]
) -> list[Tensor]:
    """`outputs` or `gradients` had the model been written in float64."""
    wide = {key: _cast(x, torch.float64) for key, x in inputs.items()}
    with Exact():
        return run(copy.deepcopy(model).double(), wide)
