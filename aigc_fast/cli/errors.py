"""How commands end that cannot do what they were asked for: one line, exit code 2."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

_LONGEST = 400
#: modules whose packages have other names
_PACKAGES = {"PIL": "pillow"}


class Commands(TyperGroup):
    """Commands that raise OSError, ValueError or ImportError where options, a file or a package
    will not do. Any other exception is a mistake in here, and keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # who read the output has closed it: click ends this quietly
            raise
        except (OSError, ValueError, ImportError) as error:
            # Not `print`: what a file holds, or is called, must not be read as markup.
            Console(stderr=True).out(_line(error), style="bold red", highlight=False)
            raise typer.Exit(2) from None


def _line(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        module = error.name.split(".")[0]
        return f"this needs a package that is not installed: {_PACKAGES.get(module, module)}"
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Makes a ValueError of whatever a file of another kind leads to, as that may be anything."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except KeyError as error:
        raise ValueError(f"{path}: not {what}: it has no {error}") from error
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which is no verdict on the file
            raise
        raise ValueError(f"{path}: not {what}: {error}") from error


@contextmanager
def memory_for(options: str) -> Iterator[None]:
    """Makes a ValueError that names the options of what there is too little memory for."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch's, by its name: commands that do without torch do not import it.
        on_gpu, on_cpu = type(error).__name__ == "OutOfMemoryError", "CPUAllocator" in str(error)
        if not (isinstance(error, MemoryError) or on_gpu or on_cpu):
            raise
        raise ValueError(f"out of memory: less of {options} takes less of it") from error
