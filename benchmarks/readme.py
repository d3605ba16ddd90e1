"""Writes the tables of README.md and benchmarks/README.md from the files of results: no figure
there is typed.

python -m benchmarks.readme
"""

import json
from pathlib import Path

from benchmarks.headlines import headlines
from benchmarks.tables import tables

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def between(text: str, name: str, content: str) -> str:
    """The text with this between the marks of that name."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"there is no {begin} ... {end}")
    return f"{before}{begin}\n\n{content}\n\n{end}{after}"


def written() -> dict[Path, str]:
    """The two files as they ought to be."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    short, whole = ROOT / "README.md", ROOT / "benchmarks" / "README.md"
    text = whole.read_text()
    for name, machine in results.items():
        text = between(text, name, tables(machine))
    return {
        short: between(short.read_text(), "headlines", headlines(list(results.values()))),
        whole: text,
    }


def main() -> None:
    for path, text in written().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
