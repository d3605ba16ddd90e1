"""The few figures of README.md, one column for each machine with results."""

from benchmarks.tables import flat, shown

#: what was done, beside what, the row of results and what its ratio is called there
ROWS = (
    ("a token of SmolLM2-135M, Q4_1", "llama.cpp", "decode", "llama.cpp"),
    ("", "transformers, float32", "decode", "transformers"),
    ("", "torch.compile, int4", "decode", "torch.compile int4"),
    ("its prompt of 512 tokens", "llama.cpp", "prefill", "llama.cpp"),
    ("a token of a patched Llama, float32", "transformers", "patch_decode[float32-1-64]",
     "transformers"),
    ("the same in bfloat16", "transformers", "patch_decode[bfloat16-1-64]", "transformers"),
    ("a token of a patched mixture of experts, float32", "transformers", "experts[token-float32]",
     "transformers"),
    ("the prompt of a patched Llama, bfloat16", "transformers", "patch_prefill[bfloat16]",
     "transformers"),
    ("the same in float16", "transformers", "patch_prefill[float16]", "transformers"),
    ("fine-tuning a language model, bfloat16", "transformers", "language_training[bfloat16]",
     "transformers"),
    ("the same in float32", "transformers", "language_training[float32]", "transformers"),
    ("sampling by a patched UNet2DModel, bfloat16", "diffusers, float32",
     "diffusion_sampling[8]", "stock"),
    ("", "torch.compile, float32", "diffusion_sampling[8]", "compiled"),
    ("a call of Stable Diffusion 1.5's U-Net, patched, float32", "diffusers",
     "patch_denoiser[sd15-float32]", "stock"),
    ("a call of Wan's transformer, patched, float32", "diffusers", "patch_denoiser[wan-float32]",
     "stock"),
    ("the same in bfloat16", "diffusers", "patch_denoiser[wan-bfloat16]", "stock"),
    ("a call of DDPM's U-Net, patched, float16", "diffusers", "patch_denoiser[ddpm-float16]",
     "stock"),
    ("a step of DPM-Solver++ 2M", "diffusers", "scheduler[DPMSolverMultistep]", "diffusers"),
    ("decoding a latent, patched AutoencoderKL, bfloat16", "diffusers, float32", "vae_decode[32]",
     "stock"),
    ("a training step of WGAN-GP DCGAN-64, bfloat16", "eager PyTorch, float32",
     "wgan_gp_dcgan_64[bf16]", "eager_fp32_step"),
    ("", "eager PyTorch, bfloat16", "wgan_gp_dcgan_64[bf16]", "eager_step"),
    ("second derivative of batch norm and activation", "eager PyTorch",
     "double_backward[batch_norm_act-64x128x32x32-float32]", "eager"),
    ("twice as large by Real-ESRGAN compact, float32", "eager PyTorch",
     "upscale[realesr-animevideov3-x2-float32]", "eager"),
    ("a sentence by a voice of Piper, bfloat16", "onnxruntime", "speech[bfloat16]", "onnxruntime"),
    ("attention to 2,048 cached tokens, bfloat16", "eager PyTorch",
     "decode_attention[b8_2048_h32_kv8_d128-bfloat16]", "eager"),
    ("top-k and top-p of 128,256 logits", "transformers",
     "sample_tokens[8x128256_top_k_top_p-float32]", "transformers"),
    ("anti-aliased snake, float32", "torch.compile", "snake[alias_free_snake-float32-forward]",
     "compile"),
)  # fmt: skip


def headlines(machines: list[dict]) -> str:
    """A table of the time of each other over ours, from files of results."""
    columns = [result["machine"]["processor"].split(",")[0] for result in machines]
    found = [{row["name"].replace("torch.", ""): row for row in m["benchmarks"]} for m in machines]
    lines = [
        f"| | time of the other / ours | {' | '.join(columns)} |",
        f"|---|---|{'---|' * len(columns)}",
    ]
    for what, other, name, key in ROWS:
        # A row may be missing, or this peer in it, which is optional.
        ratios = [flat(rows.get(name, {})).get(f"{key}_over_ours") for rows in found]
        cells = ["" if ratio is None else shown(ratio) for ratio in ratios]
        lines.append(f"| {what} | {other} | {' | '.join(cells)} |")
    return "\n".join(lines)
