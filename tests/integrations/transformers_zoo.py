"""Small random models of transformers beside the decoders of tests.models.checkpoints, a call of
each, and the operators that they run when patched."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.models.checkpoints import NO_TOKENS

VOCAB = 131
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=96,
    max_position_embeddings=64,
)
GROUPED = SIZES | dict(num_key_value_heads=2, head_dim=16)
T5 = dict(
    vocab_size=VOCAB,
    d_model=64,
    d_kv=16,
    d_ff=96,
    num_layers=2,
    num_heads=4,
    feed_forward_proj="gated-gelu",
    relative_attention_num_buckets=8,
    relative_attention_max_distance=12,
)
BART = dict(
    vocab_size=VOCAB,
    d_model=64,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=96,
    decoder_ffn_dim=96,
)
VISION = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=32,
    patch_size=8,
)
#: sections of mrope: features of time, height and width
MROPE = dict(rope_type="default", mrope_section=[2, 3, 3], rope_theta=1000.0)


class Case(NamedTuple):
    """A class of transformers, the model_type and options of its config, the keyword arguments of a
    call, the operators that a call of the patched model runs (but those that depend on the
    machine), and how often one that writes text decodes attention in each of the steps of its two
    layers: once, or with an encoder twice."""

    cls: str
    model_type: str
    options: dict[str, Any]
    inputs: Callable[[], dict[str, Tensor]]
    operators: set[str]
    decodes: int | None = None


def ids(length: int = 11, seed: int = 1) -> Tensor:
    return torch.randint(
        3, VOCAB - 1, (3, length), generator=torch.Generator().manual_seed(seed)
    )  # special tokens are the first and the last


def prompts() -> dict[str, Tensor]:
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[0, :6] = 0
    mask[2, :1] = 0
    return dict(input_ids=ids(), attention_mask=mask)


def pairs() -> dict[str, Tensor]:
    """What an encoder and a decoder read."""
    mask = prompts()["attention_mask"].flip(1)
    return dict(input_ids=ids(), attention_mask=mask, decoder_input_ids=ids(7, 2))


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def pixels() -> dict[str, Tensor]:
    return dict(pixel_values=rand(2, 3, 32, 32))


def sound() -> dict[str, Tensor]:
    return dict(input_features=rand(2, 8, 32), decoder_input_ids=ids(7)[:2])


def codes() -> dict[str, Tensor]:
    """Of MusicGen: four codebooks for each of two sequences."""
    return dict(input_ids=torch.cat([ids(7, seed) for seed in (1, 2, 3)])[:8] % 64)


def text_and_image() -> dict[str, Tensor]:
    """Qwen's: an image of 4 by 4 patches is four tokens."""
    tokens = ids(12)[:1]
    tokens[0, 2], tokens[0, 3:7], tokens[0, 7] = 120, 121, 122
    kinds = (tokens == 121).int()
    grid = torch.tensor([[1, 4, 4]])
    patches = rand(16, 3 * 2 * 4 * 4)
    return dict(
        input_ids=tokens, pixel_values=patches, image_grid_thw=grid, mm_token_type_ids=kinds
    )


def _decoder(
    cls: str,
    model_type: str,
    operators: set[str],
    sizes: dict[str, Any] = GROUPED,
    decodes: int = 1,
    **options: Any,
) -> Case:
    return Case(f"{cls}ForCausalLM", model_type, sizes | options, prompts, operators, decodes)


GATED = {"rms_norm", "swiglu"}
CASES = {
    # Text and image encoders of diffusers' pipelines.
    "t5 encoder": Case("T5EncoderModel", "t5", T5, prompts, {"rms_norm", "geglu"}),
    "umt5 encoder": Case("UMT5EncoderModel", "umt5", T5, prompts, {"rms_norm", "geglu"}),
    "clip text": Case(
        "CLIPTextModelWithProjection",
        "clip_text_model",
        SIZES | dict(eos_token_id=VOCAB - 1),
        prompts,
        set(),
    ),
    "clip vision": Case(
        "CLIPVisionModelWithProjection", "clip_vision_model", VISION, pixels, set()
    ),
    "siglip vision": Case(
        "SiglipVisionModel", "siglip_vision_model", VISION, pixels, {"gelu_tanh"}
    ),
    "qwen2.5-vl": Case(
        "Qwen2_5_VLForConditionalGeneration",
        "qwen2_5_vl",
        dict(
            text_config=GROUPED | dict(rope_parameters=MROPE) | NO_TOKENS,
            vision_config=dict(
                depth=2,
                hidden_size=64,
                intermediate_size=96,
                num_heads=4,
                out_hidden_size=64,
                patch_size=4,
                window_size=16,
                fullatt_block_indexes=[1],
            ),
            image_token_id=121,
            vision_start_token_id=120,
            vision_end_token_id=122,
        ),
        text_and_image,
        GATED,
        1,
    ),
    # Decoders.
    "gpt-neox": _decoder("GPTNeoX", "gpt_neox", set(), SIZES),
    "opt": _decoder("OPT", "opt", set(), SIZES, ffn_dim=96, word_embed_proj_dim=64),
    "phi": _decoder("Phi", "phi", {"gelu_tanh"}),
    "starcoder2": _decoder("Starcoder2", "starcoder2", {"gelu_tanh"}, sliding_window=7),
    "cohere": _decoder("Cohere", "cohere", {"modulated_norm", "swiglu"}),
    "stablelm": _decoder("StableLm", "stablelm", {"swiglu"}),
    "olmo": _decoder("Olmo", "olmo", {"swiglu"}),
    "olmo3": _decoder("Olmo3", "olmo3", GATED, sliding_window=7),
    "exaone4": _decoder("Exaone4", "exaone4", GATED, sliding_window=7),
    "glm4": _decoder("Glm4", "glm4", GATED),
    "ministral": _decoder("Ministral", "ministral", GATED, sliding_window=7),
    "gemma": _decoder("Gemma", "gemma", {"rms_norm", "geglu"}),
    # Encoders and decoders.
    # T5's attention adds a bias to the scores, which is left to torch.
    "t5": Case("T5ForConditionalGeneration", "t5", T5, pairs, {"rms_norm", "geglu"}, 0),
    "bart": Case("BartForConditionalGeneration", "bart", BART, pairs, set(), 2),
    "whisper": Case(
        "WhisperForConditionalGeneration",
        "whisper",
        BART | dict(num_mel_bins=8, max_source_positions=16, max_target_positions=32),
        sound,
        set(),
        2,
    ),
    "musicgen": Case(
        "MusicgenForCausalLM", "musicgen_decoder", SIZES | dict(ffn_dim=96), codes, set()
    ),
    # Whose attention asks no interface.
    "falcon": _decoder("Falcon", "falcon", set(), SIZES, 0, ffn_hidden_size=96),
    "bloom": _decoder("Bloom", "bloom", set(), SIZES, 0),
}


def make(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """With weights that make activations and scores near one."""
    import transformers

    case = CASES[name]
    options = NO_TOKENS | case.options | changes
    if "decoder_input_ids" in case.inputs():
        options |= dict(decoder_start_token_id=1)
    config = config_of(case.model_type, **options)
    torch.manual_seed(0)
    model = getattr(transformers, case.cls)(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:  # else all norms would be alike
                weight.add_(torch.randn(weight.shape) * 0.2)
            else:
                weight.normal_(std=1 / math.sqrt(weight[0].numel()))
    return model.to(dtype)


def config_of(model_type: str, **options: Any) -> Any:
    import transformers

    if model_type == "musicgen_decoder":
        return transformers.models.musicgen.configuration_musicgen.MusicgenDecoderConfig(**options)
    return transformers.AutoConfig.for_model(model_type, **options)


def inputs_of(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    found = CASES[name].inputs()
    return {k: x.to(dtype) if x.is_floating_point() else x for k, x in found.items()}
