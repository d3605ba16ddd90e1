"""Files that are replaced when the new ones are complete."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Another path to write to, with the suffix of `path`. What is there at the end of the block
    becomes `path`, or what that links to, with the rights of any new file, whoever wrote it
    (safetensors gives them to the owner alone); after an exception `path` is as it was. An OSError
    of writing, as on a full disk, names `path`."""
    target = path.resolve()
    partial = target.with_name(f".partial.{path.name}")
    try:
        partial.unlink(missing_ok=True)
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)
        partial.replace(target)
    except Exception as error:
        # torch's writer raises a RuntimeError after the OSError, safetensors one of its own.
        why = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(why, OSError) and why.errno is not None:
            if why.filename in (None, str(partial)):
                raise OSError(why.errno, why.strerror, str(path)) from error
        elif isinstance(why, OSError) or type(error).__name__ == "SafetensorError":
            raise OSError(f"{path}: {error}") from error
        raise
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


class _Writer(io.BufferedRandom):
    """A file that Pillow writes to by way of Python. Its encoders write to a descriptor by
    themselves, and take no notice of a disk that has room for a part alone."""

    def fileno(self) -> int:
        raise io.UnsupportedOperation


def save_picture(path: Path, image: Image.Image, **how: Any) -> None:
    """`image.save(path, **how)`, whole or not at all."""
    with written_whole(path) as partial, _Writer(io.FileIO(partial, "w+")) as file:
        image.save(file, **how)
