"""Files of results as the Markdown tables of benchmarks/README.md."""

import re
import statistics

from benchmarks.report import first_and_last


def tables(results: dict) -> str:
    """The ratios of a file of results, in Markdown: of operators, then of whole loops and steps."""
    machine = results["machine"]
    versions = ", ".join(f"{key} {machine[key]}" for key in ("torch", "triton", "python"))
    commits = ", ".join(sorted({row["commit"] for row in results["benchmarks"]}))
    command = "`python -m benchmarks.report`"
    if any(row["quick"] for row in results["benchmarks"]):
        command += " (some rows with `--quick`)"
    operators, whole = [], []
    for row in first_and_last(results["benchmarks"]):
        name = row["name"].replace("torch.", "")
        ratios = {key.rsplit("_over_", 1)[0]: value for key, value in flat(row).items()}
        both = {"eager": ratios.pop("eager", None), "torch.compile": ratios.pop("compile", None)}
        if "fraction_of_limit" in row and "eager_over_ours" in row:
            cells = [*map(shown, both.values()), f"{row['fraction_of_limit']:.0%}"]
            operators.append(f"| `{name}` | {' | '.join(cells)} |")
        elif both["eager"] is not None:
            whole.append(f"| `{name}` | {listed({**both, **ratios})} |")
        elif ratios:
            whole.append(f"| `{name}` | {listed(ratios)} |")
    return "\n".join(
        [
            f"{command} on {machine['processor']}; {versions}; commits {commits}.",
            "",
            "| call | eager / ours | torch.compile / ours | of limit |",
            "|---|---|---|---|",
            *operators,
            "",
            "| loop or step | time of each other / ours |",
            "|---|---|",
            *whole,
            *of_schedulers(results["benchmarks"]),
        ]
    )


def of_schedulers(rows: list[dict]) -> list[str]:
    """diffusers' schedulers as install() makes them: of all of them together, one line for each
    shape or number of steps."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        if "diffusers_over_installed" in row:
            groups.setdefault(re.sub(r"\[.*?-", "[", row["name"]), []).append(row)
    lines = []
    for name, group in groups.items():
        ratios = {
            "diffusers": "diffusers_over_installed",
            "without noise": "without_noise",
            "first loop": "diffusers_over_first",
            "exact": "diffusers_over_exact",
            "exact without noise": "exact_without_noise",
        }
        cells = []
        for label, key in ratios.items():
            found = sorted(row[key] for row in group if key in row)
            if found:
                middle = statistics.median(found)
                cells.append(f"{label} {found[0]:.2f} to {found[-1]:.2f}, median {middle:.2f}")
        lines.append(f"| `{name}`, {len(group)} solvers | {'; '.join(cells)} |")
    return lines


def flat(row: dict) -> dict[str, float]:
    """The ratios of a row, those of `peers_over_ours` among them."""
    peers = dict(row.get("peers_over_ours", {}))
    if "ours_over_mul" in row:
        peers["aten.mul"] = 1 / row["ours_over_mul"]
    return {
        **{f"{peer}_over_ours": ratio for peer, ratio in peers.items()},
        **{k: v for k, v in row.items() if k.endswith("_over_ours") and isinstance(v, float)},
    }


def shown(ratio: float | None) -> str:
    return "n/a" if ratio is None else f"{ratio:.2f}"


def listed(ratios: dict[str, float | None]) -> str:
    return ", ".join(f"{name} {shown(ratio)}" for name, ratio in ratios.items())
