"""Runs the suites and writes benchmarks/results/<machine>.json and .png.

python -m benchmarks.report [--quick | --largest] [--seconds N] [suite ...]

A row of results names its suite, the commit it was measured at and whether briefly; some suites run
by themselves replace their own rows alone.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.machine import describe, slug

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def run_suites(suites: list[str], options: list[str]) -> tuple[list[dict], int]:
    """The benchmarks of pytest-benchmark's report: suite, name, and what `measure` noted; and how
    pytest ended. What failed has no row."""
    names = suites or sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
    files = [HERE / f"bench_{name}.py" for name in names]
    for file in files:
        if not file.exists():
            raise SystemExit(f"no such suite: {file.name}")
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        run = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", *map(str, files), "--benchmark-enable", "-q"),
                "--continue-on-collection-errors",
                *("-p", "no:cacheprovider", f"--benchmark-json={report.name}"),
                *("--benchmark-columns=median,rounds", *options),
            ],
            cwd=HERE.parent,
        )
        text = Path(report.name).read_text()
        rows = json.loads(text)["benchmarks"] if text else []
    found = [
        {
            "suite": Path(row["fullname"].split("::")[0]).stem.removeprefix("bench_"),
            "name": row["name"].removeprefix("bench_"),
            **row["extra_info"],
        }
        for row in rows
    ]
    return found, run.returncode


def kept(path: Path, machine: dict, measured: set[str]) -> list[dict]:
    """The rows of a file of results that still hold: other suites', on the same machine."""
    if not path.exists():
        return []
    results = json.loads(path.read_text())
    if results["machine"] != machine:
        return []
    return [row for row in results["benchmarks"] if row["suite"] not in measured]


def table(rows: list[dict]) -> str:
    """The ratios, one line a benchmark."""
    lines = [f"{'benchmark':72} {'eager/ours':>10} {'compile/ours':>12} {'of limit':>9}"]
    for row in rows:
        if "eager_over_ours" in row:
            compiled = row.get("compile_over_ours")  # not compiled, or not to be
            lines.append(
                f"{row['name'][:72]:72} {row['eager_over_ours']:>9.2f}x"
                f" {'n/a' if compiled is None else f'{compiled:.2f}x':>12}"
                f" {row.get('fraction_of_limit', 0):>8.0%}"
            )
        elif "stock_over" in row:
            over = ", ".join(f"{name} {x:.2f}x" for name, x in row["stock_over"].items())
            seconds = row.get("compile_seconds")
            compiling = "" if seconds is None else f"; compiling took {seconds:.0f} s"
            lines.append(f"{row['name'][:72]:72} stock over: {over}{compiling}")
        elif "diffusers_over_ours" in row:
            lines.append(f"{row['name'][:72]:72} diffusers/ours {row['diffusers_over_ours']:.2f}x")
        elif "diffusers_over_installed" in row:
            over = f"diffusers/installed {row['diffusers_over_installed']:.2f}x"
            over += f", without noise {row['without_noise']:.2f}x"
            if "diffusers_over_first" in row:
                over += f", first loop {row['diffusers_over_first']:.2f}x"
            over += f", exact {row['diffusers_over_exact']:.2f}x"
            lines.append(f"{row['name'][:72]:72} {over}")
        elif "peers_over_ours" in row:
            peers = ", ".join(f"{name} {x:.2f}x" for name, x in row["peers_over_ours"].items())
            lines.append(f"{row['name'][:72]:72} time of others over ours: {peers}")
        elif "microseconds" in row:
            micro = row["microseconds"]
            lines.append(
                f"{row['name'][:72]:72} {micro['ours']:.2f} us, aten.mul {micro['aten.mul']:.2f} us"
            )
    return "\n".join(lines)


def first_and_last(rows: list[dict]) -> list[dict]:
    """Two rows of each benchmark: enough to read, and the same two in every run."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["suite"], row["name"].split("[")[0]), []).append(row)
    return [row for group in groups.values() for row in (group[:1] + group[1:][-1:])]


def draw(rows: list[dict], title: str, path: Path) -> None:
    """Bars of the speed relative to eager PyTorch, for the rows of `first_and_last`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in first_and_last(rows) if "eager" in row.get("seconds", ())][::-1]
    figure, axes = plt.subplots(figsize=(10, 1.2 + 0.3 * len(rows)), layout="constrained")
    axes.axvline(1, color="#41464d", linewidth=1, label="eager PyTorch")
    for offset, name, label, colour in (
        (-0.18, "ours", "aigc_fast", "#d1495b"),
        (0.18, "compile", "torch.compile", "#8d96a3"),
    ):
        values = [row["seconds"]["eager"] / row["seconds"].get(name, float("nan")) for row in rows]
        places, beyond = [i + offset for i in range(len(rows))], [v - 1 for v in values]
        bars = axes.barh(places, beyond, left=1, height=0.34, color=colour, label=label)
        if name == "ours":
            axes.bar_label(bars, [f"{v:.1f}x" for v in values], padding=3, fontsize=8)
    names = [row["name"].replace("torch.", "") for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xscale("log")
    ticks = [0.5, 1, 2, 5, 10, 20, 50, 100, 200]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(0.5, 200)
    axes.set_xlabel("speed relative to eager PyTorch (higher is better)")
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], frameon=False, loc="lower right")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suites", nargs="*", help="for instance bias_act; default: all")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--largest", action="store_true", help="of each the largest call alone")
    parser.add_argument("--seconds", type=float, help="what begins later is left out")
    options = parser.parse_args()
    machine = describe()
    commit = machine.pop("commit")
    chosen = [f"--{name}" for name in ("quick", "largest") if vars(options)[name]]
    if options.seconds is not None:
        chosen += ["-p", "tests.on_device", f"--seconds={options.seconds}"]
    rows, code = run_suites(options.suites, chosen)
    if not rows:
        raise SystemExit(code or "no benchmark ran")
    print(table(rows))
    rows = [{**row, "commit": commit, "quick": options.quick} for row in rows]
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{slug()}.json"
    rows += kept(path, machine, {row["suite"] for row in rows})
    rows.sort(key=lambda row: row["suite"])
    path.write_text(json.dumps({"machine": machine, "benchmarks": rows}, indent=1) + "\n")
    draw(rows, f"{machine['processor']} · torch {machine['torch']}", path.with_suffix(".png"))
    print(f"wrote {path.relative_to(HERE.parent)} and its picture")
    raise SystemExit(code)


if __name__ == "__main__":
    main()
