"""The `aigc-fast` command."""

import sys


def main() -> None:
    """Runs the command line; exit code 2 where a package is missing."""
    try:
        from .app import app
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("typer", "rich", "click"):
            raise
        print(
            "aigc-fast needs the packages typer and rich: pip install typer rich", file=sys.stderr
        )
        raise SystemExit(2) from None
    app()


__all__ = ["main"]
