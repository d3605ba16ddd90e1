"""`aigc-fast doctor`: what is here, what runs where, and whether it computes correctly."""

import importlib.metadata
import os
import platform
import time

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import aigc_fast
from aigc_fast import _libraries

from .self_check import check_all

_SHORT = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def run(console: Console) -> int:
    """Exit code: 1 if an operator fails its check."""
    start = time.perf_counter()
    console.print(_facts())
    console.print(_operators())
    with console.status("checking every operator against its reference"):
        checks = list(check_all())
    failed = [check for check in checks if not check.ok]
    table = _table("Self-check in float32: results and gradients")
    for heading in ("operator", "device", "runs on"):
        table.add_column(heading)
    for heading in ("error", "allowed"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for check in checks:
        verdict = "[green]ok[/]" if check.ok else "[bold red]FAILED[/]"
        error = ["", ""] if check.problem else [f"{check.error:.1e}", f"{check.allowed:.1e}"]
        table.add_row(check.op, check.device, check.implementation, *error, verdict)
    console.print(table)
    for check in failed:
        reason = check.problem or f"error {check.error:.3g}, allowed {check.allowed:.3g}"
        console.print(f"{check.op} on {check.device}: {reason}", markup=False)
    seconds = time.perf_counter() - start
    if failed:
        console.print(
            f"[bold red]{len(failed)} of {len(checks)} checks failed[/] ({seconds:.1f} s)"
        )
        return 1
    console.print(f"[green]all {len(checks)} checks passed[/] ({seconds:.1f} s)")
    return 0


def _facts() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in _machine() + _build():
        table.add_row(name, Text(value))
    return table


def _machine() -> list[tuple[str, str]]:
    rows = [
        ("aigc_fast", f"{aigc_fast.__version__}, Python {platform.python_version()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("triton", _version("triton")),
        ("CPU", f"{platform.machine()}, {os.cpu_count()} logical cores"),
    ]
    if not torch.cuda.is_available():
        rows.append(("GPU", "none"))
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        rows.append(
            (
                f"GPU {i}",
                f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}",
            )
        )
    return rows


def _build() -> list[tuple[str, str]]:
    """What was compiled, and what of it is in use."""
    rows = []
    try:
        from aigc_fast import _host
    except ImportError as error:
        rows.append(("host module", f"missing: {error}"))
    else:
        features = [name for name, there in _host.cpu_features().items() if there]
        info = _host.build_info()
        rows.append(("CPU features", ", ".join(features) or "none of those asked for"))
        rows.append(("built", f"against torch {info['torch']}, by gcc {info['compiler']}"))
        rows.append(("CPU levels", info["cpu_levels"]))
        rows.append(("CUDA targets", info["cuda_archs"] or "none"))
    for kind in ("cpu", "cuda"):
        if kind in _libraries.loaded:
            rows.append((f"{kind} library", f"loaded {_libraries.loaded[kind].name}"))
        else:
            rows.append((f"{kind} library", _libraries.missing.get(kind, "not looked for")))
    if "cpu" in _libraries.missing or (torch.cuda.is_available() and "cuda" in _libraries.missing):
        rows.append(("to mend it", _libraries.MEND))
    return rows


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _operators() -> Table:
    table = _table("Operators and their implementations here")
    for heading in ("operator", "implementations", "dtypes"):
        table.add_column(heading)
    for row in sorted(aigc_fast.list_ops(), key=lambda row: row["op"]):
        dtypes = " ".join(_SHORT.get(dtype, dtype) for dtype in row["dtypes"])
        table.add_row(row["op"], " ".join(row["implementations"]), dtypes)
    return table


def _table(title: str) -> Table:
    return Table(title=f"\n{title}", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
