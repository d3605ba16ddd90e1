"""Files that are replaced when the new ones are complete."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Another path to write to. What is there at the end of the block becomes `path`, with the
    rights of any new file, whoever wrote it (safetensors gives them to the owner alone); after an
    exception `path` is as it was."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    partial.touch()
    mode = partial.stat().st_mode
    try:
        yield partial
        partial.chmod(mode)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
