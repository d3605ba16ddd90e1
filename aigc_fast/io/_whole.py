"""Files that are replaced when the new ones are complete."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Another path to write to. What is there at the end of the block becomes `path`, with the
    rights of any new file, whoever wrote it (safetensors gives them to the owner alone); after an
    exception `path` is as it was. What a full disk leads to is an OSError that names `path`."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    partial.touch()
    mode = partial.stat().st_mode
    try:
        yield partial
        partial.chmod(mode)
        partial.replace(path)
    except Exception as error:
        # torch's writer raises a RuntimeError after the OSError, safetensors one of its own.
        why = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(why, OSError) and why.errno is not None and why.filename is None:
            raise OSError(why.errno, why.strerror, str(path)) from error
        if type(error).__name__ == "SafetensorError":
            raise OSError(f"{path}: {error}") from error
        raise
    finally:
        partial.unlink(missing_ok=True)
