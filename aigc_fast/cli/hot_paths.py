"""The demo's table: one call of each hot path, three implementations, times and errors."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from aigc_fast import ops
from aigc_fast._timing import interleaved
from aigc_fast.models.vocoder.blocks import SLOPE, ResBlock2

from .demo_speech import SpeechResult
from .demo_text import TextResult

EAGER, COMPILE, OURS, REFERENCE = "eager PyTorch", "torch.compile", "aigc_fast", "reference"


@dataclass
class HotPath:
    """What plain PyTorch and this library each call, and with what."""

    name: str
    shape: str
    plain: Callable[..., Any]
    ours: Callable[..., Any]
    inputs: Sequence[Tensor]
    #: gradients are taken too, with this one coming in
    upstream: Tensor | None = None


@dataclass
class Measured:
    """Seconds a call, and the worst error over the largest value, of each implementation."""

    path: HotPath
    seconds: dict[str, float]
    errors: dict[str, float]


def decode_attention(device: torch.device, quick: bool) -> HotPath:
    batch, cached, heads, kv_heads, head_dim = (1, 64, 8, 2, 64) if quick else (8, 2048, 32, 8, 128)
    random = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=random).bfloat16()

    cache = (batch, cached, kv_heads, head_dim)
    lengths = torch.full((batch,), cached, dtype=torch.int32, device=device)

    def plain(query: Tensor, key_cache: Tensor, value_cache: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key_cache.transpose(1, 2),
            value_cache.transpose(1, 2),
            enable_gqa=True,
        ).transpose(1, 2)

    return HotPath(
        "decode_attention",
        f"bf16, {batch} x {cached} cached\n{heads} heads, {kv_heads} kv, {head_dim}",
        plain,
        lambda query, key_cache, value_cache: ops.decode_attention(
            query, key_cache, value_cache, lengths
        ),
        [draw(batch, 1, heads, head_dim), draw(*cache), draw(*cache)],
    )


def scheduler_step(device: torch.device, quick: bool) -> HotPath:
    shape = (1, 4, 8, 8) if quick else (2, 16, 128, 128)
    random = torch.Generator(device).manual_seed(0)
    alpha, sigma, next_alpha, next_sigma, guidance = 0.6, 0.8, 0.8, 0.6, 5.0
    row = [1 / alpha, -sigma / alpha, 1.0, next_alpha, 0.0, next_sigma, 0.0]
    # Two formats, so that the reference in fp64 is not held back by a row in fp32.
    rows = {d: torch.tensor(row, dtype=d, device=device) for d in (torch.float32, torch.float64)}

    def plain(sample: Tensor, cond: Tensor, uncond: Tensor) -> Tensor:
        output = uncond + guidance * (cond - uncond)
        x0 = ((sample - sigma * output) / alpha).clamp(-1, 1)
        return next_alpha * x0 + next_sigma * output

    return HotPath(
        "scheduler_step",
        f"DDIM with guidance\nfp32 {shape}",
        plain,
        lambda sample, cond, uncond: ops.scheduler_step(
            sample, cond, rows[sample.dtype], uncond_output=uncond, guidance_scale=guidance
        ),
        [torch.randn(shape, device=device, generator=random) for _ in range(3)],
    )


def bias_act(device: torch.device, quick: bool) -> HotPath:
    shape = (2, 8, 4, 4) if quick else (16, 512, 32, 32)
    random = torch.Generator(device).manual_seed(0)

    def plain(x: Tensor, bias: Tensor) -> Tensor:
        return (F.leaky_relu(x + bias[:, None, None], 0.2) * math.sqrt(2)).clamp(-256, 256)

    return HotPath(
        "bias_act",
        f"forward and backward\nfp32 {shape}",
        plain,
        lambda x, bias: ops.bias_act(x, bias, 1, "lrelu", clamp=256.0),
        [
            torch.randn(shape, device=device, generator=random).requires_grad_(),
            torch.randn(shape[1], device=device, generator=random).requires_grad_(),
        ],
        upstream=torch.randn(shape, device=device, generator=random),
    )


def residual_block(device: torch.device, quick: bool) -> HotPath:
    """A block of the decoder of the demo's voice on a second of speech: two calls of `conv1d`."""
    channels, kernel, dilations, steps = 64, 7, (3, 12), 100 if quick else 86 * 64
    random = torch.Generator(device).manual_seed(0)
    block = ResBlock2(channels, kernel, dilations).to(device).requires_grad_(False)
    for parameter in block.parameters():
        scale = (channels * kernel) ** -0.5
        parameter.copy_(torch.randn(parameter.shape, device=device, generator=random) * scale)

    def plain(x: Tensor, *parameters: Tensor) -> Tensor:
        for weight, bias, d in zip(parameters[::2], parameters[1::2], dilations, strict=True):
            padding = d * (kernel - 1) // 2
            x = x + F.conv1d(F.leaky_relu(x, SLOPE), weight, bias, 1, padding, d)
        return x

    return HotPath(
        "conv1d",
        f"a block of HiFi-GAN\nfp32 (1, {channels}, {steps})",
        plain,
        lambda x, *_: block(x),
        [torch.randn(1, channels, steps, device=device, generator=random), *block.parameters()],
    )


PATHS = (decode_attention, scheduler_step, bias_act, residual_block)


def compare(console: Console, device: torch.device, *, quick: bool) -> list[Measured]:
    return [_measure(console, path(device, quick), 0.1 if quick else 2.5) for path in PATHS]


def _measure(console: Console, path: HotPath, seconds: float) -> Measured:
    calls: dict[str, Callable[[], Any]] = {
        EAGER: _call(path, path.plain),
        OURS: _call(path, path.ours),
    }
    with console.status(f"{path.name}: compiling what it is compared with"):
        compiled = _call(path, torch.compile(path.plain, dynamic=False))
        try:
            compiled()
            calls = {EAGER: calls[EAGER], COMPILE: compiled, OURS: calls[OURS]}
        except Exception as error:  # Inductor needs a C++ compiler and may fail in many ways
            reason = str(error).strip().splitlines()[0][:200]
            console.print(f"torch.compile does not work here: {reason}", markup=False)
    with console.status(f"{path.name}: measuring"):
        exact = _call(path, path.plain, torch.float64)()
        errors = {key: _worst_error(call(), exact) for key, call in calls.items()}
        measured = Measured(path, interleaved(calls, seconds=seconds), errors)
    console.print(f"[dim]{path.name}: done[/]")
    return measured


def _call(
    path: HotPath, function: Callable[..., Any], dtype: torch.dtype | None = None
) -> Callable[[], list[Tensor]]:
    """A call without arguments that returns the output and, where wanted, the gradients."""
    inputs = [x.detach().to(dtype or x.dtype).requires_grad_(x.requires_grad) for x in path.inputs]
    if path.upstream is None:
        return lambda: [function(*inputs)]
    upstream = path.upstream.to(dtype or path.upstream.dtype)

    def forward_and_backward() -> list[Tensor]:
        y = function(*inputs)
        return [y.detach(), *torch.autograd.grad(y, inputs, upstream)]

    return forward_and_backward


def _worst_error(got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Largest error of any element, as a share of the largest value of its tensor."""
    return max(
        ((g.double() - e).abs().max() / e.abs().max()).item()
        for g, e in zip(got, exact, strict=True)
    )


def table(
    paths: Sequence[Measured], text: TextResult, speech: SpeechResult, device: torch.device
) -> Table:
    where = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    result = Table(
        title=f"Median times on this machine ({where})",
        caption="error: worst of any element against float64, as a share of the largest value",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_lines=True,
    )
    result.add_column("hot path")
    result.add_column("implementation", no_wrap=True)
    for heading in ("time", "speed-up", "error"):
        result.add_column(heading, justify="right", no_wrap=True)
    for measured in paths:
        errors = {name: f"{error:.1e}" for name, error in measured.errors.items()}
        _add(result, measured.path.name, measured.path.shape, measured.seconds, errors)
    for name, unit, whole, verdict in (
        ("SmolLM2-135M", "a token, greedy, fp32", text, text.same_tokens and "same tokens"),
        ("VITS", "1 s of audio, fp32", speech, speech.same_audio and "same audio"),
    ):
        seconds = {REFERENCE: whole.reference, OURS: whole.ours}
        verdicts = {REFERENCE: "", OURS: verdict or "[bold red]DIFFERENT[/]"}
        _add(result, name, unit, seconds, verdicts)
    return result


def _add(
    table: Table, name: str, shape: str, seconds: dict[str, float], errors: dict[str, str]
) -> None:
    """A row whose cells hold a line for each implementation; the first is what the others are
    compared with."""
    first, *_ = seconds.values()
    columns = [
        list(seconds),
        [_duration(s) for s in seconds.values()],
        [f"{first / s:.2f}x" for s in seconds.values()],
        [errors[key] for key in seconds],
    ]
    emphasised = [
        "\n".join(
            f"[bold green]{c}[/]" if key == OURS else c
            for key, c in zip(seconds, cells, strict=True)
        )
        for cells in columns
    ]
    table.add_row(f"[bold]{name}[/]\n[dim]{shape}[/]", *emphasised)


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"
